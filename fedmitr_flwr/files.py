"""Files that are either whole or absent: text and tensors, written beside their place and then renamed."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import DiskError, RunError

# One entry only: safetensors writes several in random order, and equal contents shall give equal bytes.
_HEADER = "fedmitr"
_FULL = ("No space left on device", "Disk quota exceeded")  # as the system says, and safetensors repeats
_OF_THE_SYSTEM = "(os error "  # in safetensors' text; without it, it is the contents that no disk would take


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; when the block ends well, it takes `path`'s place at once.

    Raises:
        DiskError: the file cannot be written (read-only, disk full, ...).
        RunError: no such file can be made of these contents; trying again is of no use.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if not isinstance(error, OSError) and _OF_THE_SYSTEM not in str(error):
            raise RunError(f"cannot write {path}: {error}; its contents fit no safetensors file") from error
        fix = "make room there" if any(text in str(error) for text in _FULL) else "mend that"
        raise DiskError(f"cannot write {path}: {error}; {fix}, and go on with resume-from") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object] | None = None) -> None:
    """Write safetensors; `header` is any JSON object. Equal tensors and headers give equal bytes."""
    with replacing(path) as temporary:
        save_file(_each_its_own(tensors), temporary, {_HEADER: json.dumps(header or {}, sort_keys=True)})


def _each_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and none a part of another's memory, which safetensors refuses; no copy but for that."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        if memory.nbytes() != plain.nbytes or memory.data_ptr() in taken:
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file written by `save_tensors`.

    Raises:
        RunError: the file is missing, cut short or not one of ours. It is named.
    """
    with reading(path) as file:
        # Cloned: what safetensors gives is a view of the mapped file, which may be written again, and not aligned.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, header_of(file, path)  # noqa: SIM118


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """An open safetensors file, of which only what is asked for is read.

    Raises:
        RunError: the file is missing, cut short or corrupt. It is named.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is corrupt: {error}") from error


def header_of(file: Any, path: Path) -> dict[str, Any]:
    """The header that `save_tensors` wrote into a file that is open now."""
    try:
        header: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
        return header
    except KeyError as error:
        raise RunError(f"{path} was not written by fedmitr (no {error} in its header)") from error
    except ValueError as error:
        raise RunError(f"{path} is corrupt: {error}") from error
