"""Files that are either whole or absent: text and tensors, written beside their place and then renamed.

Files of tensors carry a checksum of their contents, which is compared when they are read. What a run writes is for its
owner alone.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import DiskError, RunError

if TYPE_CHECKING:  # torch takes seconds to import, and lists and pages of runs need none of it
    from torch import Tensor

PRIVATE = 0o600  # mode of a file: uploads, and what is made of them, are for the owner of the run
PRIVATE_FOLDER = 0o700

# One entry only: safetensors writes several in random order, and equal contents shall give equal bytes.
_HEADER = "fedmitr"
_CHECKSUM = "checksum"  # in that entry; files of 0.1.0 have none
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # some network file systems; a folder one may not list
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
        temporary.chmod(PRIVATE)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if not isinstance(error, OSError) and _OF_THE_SYSTEM not in str(error):
            raise RunError(f"cannot write {path}: {error}; its contents fit no safetensors file") from error
        fix = "make room there" if any(text in str(error) for text in _FULL) else "mend that"
        raise DiskError(f"cannot write {path}: {error}; {fix}, and go on with resume-from") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut, which the fsync of a file does not."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def absolute(path: Path | str, key: str = "the path") -> Path:
    """The path from the root, `~` too.

    Raises:
        RunError: there is no home folder or no current one, or it is no path at all. `key` says what to set.
    """
    try:
        found = Path(path).expanduser().absolute()
        found.exists()
    except (RuntimeError, OSError, ValueError) as error:  # no HOME and no entry in passwd; a name that is too long
        why = getattr(error, "strerror", None) or error
        other = "a path that begins with /" if isinstance(error, RuntimeError) else "another path"
        raise RunError(f"cannot look at {str(path)!r}: {why}; set {key} to {other}") from error
    return found


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """The text of a file; OSError where it is none. A pipe, say, would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_text(encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, object] | None = None) -> None:
    """Write safetensors; `header` is any JSON object. Equal tensors and headers give equal bytes."""
    from safetensors.torch import save_file

    content, own = dict(header or {}), _each_its_own(tensors)
    content[_CHECKSUM] = checksum(own, content)
    with replacing(path) as temporary:
        save_file(own, temporary, {_HEADER: json.dumps(content, sort_keys=True)})


def checksum(tensors: Mapping[str, "Tensor"], header: Mapping[str, object]) -> str:
    """64 hexadecimal characters over tensors and header; one tensor is read at a time."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def hash_tensors(digest: "hashlib._Hash", tensors: Mapping[str, "Tensor"], prefix: str = "") -> None:
    """Add names, types, shapes and contents to a hash; one tensor is read at a time."""
    import torch

    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((prefix + name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def require_checksum(
    path: Path, tensors: Mapping[str, "Tensor"], header: Mapping[str, object], expected: str | None
) -> None:
    """Raise RunError if these are not the contents that `path` was written with; None: it was written without one."""
    if expected is not None and checksum(tensors, header) != expected:
        raise RunError(f"{path} was altered after it was written (its checksum differs)")


def _each_its_own(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
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


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """The tensors and the header of a file written by `save_tensors`.

    Raises:
        RunError: the file is missing, cut short, altered or not one of ours. It is named.
    """
    with reading(path) as file:
        header, expected = header_of(file, path)
        # Cloned: what safetensors gives is a view of the mapped file, which may be written again, and not aligned.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    require_checksum(path, tensors, header, expected)
    return tensors, header


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """An open safetensors file, of which only what is asked for is read.

    Raises:
        DiskError: the file is there, but may not or cannot be read.
        RunError: the file is missing, cut short or corrupt. It is named.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise RunError(f"{path} is corrupt: it is no file")
        path.open("rb").close()  # first, as safetensors says of a file without permission that there is none
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except PermissionError as error:
        fix = "its owner can give you the permission (chmod, chown)"
        raise DiskError(f"cannot read {path}: {error.strerror}; {fix}") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is corrupt: {error}") from error


def header_of(file: Any, path: Path) -> tuple[dict[str, Any], str | None]:
    """The header that `save_tensors` wrote into a file that is open now, and the checksum, if there is one."""
    try:
        header = json.loads((file.metadata() or {})[_HEADER])
    except KeyError as error:
        raise RunError(f"{path} was not written by fedmitr (no {error} in its header)") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is corrupt: {error}") from error
    if not isinstance(header, dict):
        raise RunError(f"{path} is corrupt: its header is no table")
    return header, header.pop(_CHECKSUM, None)
