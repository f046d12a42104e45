"""Weights that stay on disk until they are asked for: the server holds what it works on, not all that was sent."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RunError
from ..files import header_of, reading


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of one file by `files.save_tensors`, each read anew when it is asked for; floating ones as float32.

    Attributes:
        path: the file.
        header: what was saved beside the tensors.
        shapes: of the tensors, by name.
        num_bytes: of all tensors as they lie in the file, before the cast.
    """

    def __init__(self, path: Path) -> None:
        """Look at the header only.

        Raises:
            RunError: the file is missing, cut short or not one of ours. It is named.
        """
        self.path = path
        with reading(path) as file:
            self._state = _state(path)
            self.header: dict[str, Any] = header_of(file, path)
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            with path.open("rb") as raw:
                header_bytes = int.from_bytes(raw.read(8), "little")
            self.num_bytes = path.stat().st_size - 8 - header_bytes  # the format has no gaps between tensors

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is none of this name.
            RunError: the file is not what it was when this object was made.
        """
        if name not in self.shapes:
            raise KeyError(name)
        if _state(self.path) != self._state:
            raise RunError(
                f"{self.path} was changed or moved while the run used it; set resume-from to its run folder to go on"
            )
        with reading(self.path) as file:
            # Cloned: what safetensors gives is a view of the mapped file, whose pages would count as memory.
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor.float() if tensor.is_floating_point() else tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _state(path: Path) -> tuple[int, ...] | None:
    """Another file of the same name has another one, and so has a file that was written to; None: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
