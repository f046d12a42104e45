"""Weights that stay on disk until they are asked for: the server holds what it works on, not all that was sent."""

import json
import os
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..common.errors import RunError
from ..common.files import header_of, reading, require_checksum

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes from the beginning of the file
    size: int  # in bytes


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of one file by `files.save_tensors`, each read anew when it is asked for; floating ones as float32.

    Plain reads and not a mapped file: a file that is cut short meanwhile is an error and not a crash, and what was read
    is the reader's own. `header` is what was saved beside the tensors.
    """

    def __init__(self, path: Path) -> None:
        """Look at the header only.

        Raises:
            RunError: the file is missing, cut short or not one of ours. It is named.
        """
        self.path = path
        with reading(path) as checked:  # safetensors compares the header with the file's length
            self.header: dict[str, Any]
            self.header, self._checksum = header_of(checked, path)
            with path.open("rb") as file:
                self._state = _state(file)
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
        del entries["__metadata__"]
        self._places = {
            name: _Place(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start, stop - start)
            for name, entry in entries.items()
            for start, stop in [entry["data_offsets"]]
        }
        self._all, self._exact = self._places, False

    @property
    def exact(self) -> "StoredWeights":
        """The same tensors in the types that they have in the file."""
        own = copy(self)
        own._exact = True
        return own

    @property
    def has_checksum(self) -> bool:
        """Whether `require_unaltered` has something to compare with; files of 0.1.0 have nothing."""
        return self._checksum is not None

    def require_unaltered(self) -> None:
        """Raise RunError if the contents are not those that the file was written with. Reads all of it."""
        whole = self.exact
        whole._places = self._all
        require_checksum(self.path, whole, self.header, self._checksum)

    def split(self, prefix: str) -> tuple["StoredWeights", "StoredWeights"]:
        """The tensors without this prefix, and those with it, under their names behind it and in their own type."""
        others, own = copy(self), copy(self)
        others._places = {name: place for name, place in self._places.items() if not name.startswith(prefix)}
        own._places = {
            name.removeprefix(prefix): place for name, place in self._places.items() if name.startswith(prefix)
        }
        own._exact = True
        return others, own

    @property
    def num_bytes(self) -> int:
        """Of all tensors as they lie in the file, before the cast."""
        return sum(place.size for place in self._places.values())

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is none of this name.
            RunError: the file is not what it was when this object was made.
        """
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        room = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with self.path.open("rb") as file:
                file.seek(place.start)
                whole = _state(file) == self._state and file.readinto(room.data) == room.nbytes
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror}; {_FIX}") from error
        if not whole:
            raise RunError(f"{self.path} was changed while the run used it; {_FIX}")
        return tensor.float() if tensor.is_floating_point() and not self._exact else tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


_FIX = "set resume-from to its run folder to go on"


def _state(file: BinaryIO) -> tuple[int, int, int]:
    """Another file has another one, and so has the same file once it was written to."""
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns
