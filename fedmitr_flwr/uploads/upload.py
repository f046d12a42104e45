"""What one client sends, once: its weights and a few numbers; checked before use, kept bit by bit on disk."""

import hashlib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import DiskError, RunError, UploadError
from ..common.files import hash_tensors, save_tensors
from ..config import Config, UploadConfig
from ..statistics import inputs, moments
from .stored import StoredWeights

DTYPES = (torch.float32, torch.float16)
_NAMES = reprlib.Repr()  # a stranger's may be long
_NAMES.maxstring = 100
STATISTICS = "statistics/"  # before their names in the file of an upload
ASK_AGAIN = "delete it and set resume-from to its run folder to ask that client again"

_NONE = type(None)
_KINDS: Mapping[str, tuple[type, ...]] = {  # of what is in the header of an upload's file
    "client": (int,),
    "num_examples": (int,),
    "train_loss": (float, int),
    "fingerprint": (str,),
    "class_counts": (list, _NONE),
    "seconds": (float, int, _NONE),
    "epsilon": (float, int, _NONE),
}


@dataclass(frozen=True, eq=False)
class Upload:
    """One client's upload.

    `class_counts` (images per class) are there only where `upload.extras` has counts or statistics. In `statistics` is
    what `statistics.moments.measure` gives, with statistics, and `statistics.inputs.measure`, with moments.
    """

    client: int
    weights: Mapping[str, Tensor] = field(repr=False)  # of an upload on disk: read when asked for
    num_examples: int
    train_loss: float  # mean of the last local epoch
    fingerprint: str  # of the code that trained it, 12 hex characters
    class_counts: tuple[int, ...] | None = None
    seconds: float | None = None  # that the training took
    statistics: Mapping[str, Tensor] | None = field(default=None, repr=False)
    epsilon: float | None = None  # that the training spent; None: it was not private

    @property
    def num_bytes(self) -> int:
        """Size of all tensors as they were sent; nothing is read."""
        return size(self.weights) + size(self.statistics or {})


def narrowed(upload: Upload, asked: UploadConfig) -> Upload:
    """What these settings ask of an upload: no more is used, and no more is counted."""
    statistics = upload.statistics
    if statistics is not None:
        sums = moments.names(asked)
        wanted = [name for name in statistics if (asked.moments if name.startswith(inputs.PREFIX) else name in sums)]
        if len(wanted) < len(statistics):
            statistics = {name: statistics[name] for name in wanted} or None
    return replace(upload, class_counts=upload.class_counts if asked.counts else None, statistics=statistics)


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together; those on disk are not read."""
    if isinstance(tensors, StoredWeights):
        return tensors.num_bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def digest(upload: Upload) -> str:
    """A hash of everything in an upload that the server phase uses, in hexadecimal; one tensor is read at a time."""
    sha256 = hashlib.sha256(repr((upload.client, upload.num_examples, upload.class_counts)).encode())
    hash_tensors(sha256, upload.weights)
    hash_tensors(sha256, upload.statistics or {}, STATISTICS)
    return sha256.hexdigest()


def validate(upload: Upload, reference: Mapping[str, Tensor], config: Config, fingerprint: str | None = None) -> None:
    """Let an upload pass, as it arrived and before any cast, if it may enter the ensemble of a run with this `config`.

    The weights that the client started from, `reference`, give the keys, shapes and dtypes. The `fingerprint` is of the
    server's code; None: any code may have made it.

    Raises:
        UploadError: "client 3: ..." with what is wrong and the fix.
    """
    problem = (
        _wrong_origin(upload, fingerprint, config.partition.clients)
        or _wrong_keys(upload.weights, reference)
        or _wrong_tensor(upload.weights, reference)
        or _wrong_numbers(upload, config.model.num_classes, config.screen.max_images)
        or _wrong_statistics(upload, reference, config.upload)
    )
    if problem:
        raise UploadError(f"client {upload.client}: {problem}")


def _wrong_origin(upload: Upload, fingerprint: str | None, clients: int) -> str | None:
    if not 0 <= upload.client < clients:
        return f"there are only the clients 0 to {clients - 1}; give every node its own partition-id below {clients}"
    if fingerprint is not None and upload.fingerprint != fingerprint:
        return (
            f"it ran other code ({upload.fingerprint}) than the server ({fingerprint}); "
            "restart the SuperLink and its SuperNodes from this checkout"
        )
    return None


def _wrong_keys(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    fix = "server and client must have the same [model] settings"
    if missing := [key for key in reference if key not in weights]:
        return f"its weights lack {_few(missing)}; {fix}"
    if extra := [key for key in weights if key not in reference]:
        return f"its weights have the unknown {_few(extra)}; {fix}"
    return None


def _wrong_tensor(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> str | None:
    for key, wanted in reference.items():
        tensor = weights[key]
        if tensor.shape != wanted.shape:
            return (
                f"{key} has the shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}; "
                "server and client must have the same [model] settings"
            )
        allowed = DTYPES if wanted.is_floating_point() else (wanted.dtype,)
        if tensor.dtype not in allowed:
            return f"{key} is {_name(tensor.dtype)}; it must be {' or '.join(map(_name, allowed))} (upload.dtype)"
    broken = [key for key, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        return f"NaN or infinity in {_few(broken)}; lower local.lr, or set upload.dtype = 'float32' if it was float16"
    return None


def _wrong_numbers(upload: Upload, num_classes: int, max_images: int) -> str | None:
    if upload.num_examples < 1:
        return f"it trained on {upload.num_examples} images; give it some (partition.min-size)"
    if upload.num_examples > max_images:
        return (
            f"it says that it trained on {upload.num_examples} images, and screen.max-images is {max_images}; "
            "raise that if it is true"
        )
    if not math.isfinite(upload.train_loss):
        return f"its training loss is {upload.train_loss}; lower local.lr"
    if upload.seconds is not None and not 0 <= upload.seconds < math.inf:
        return f"its training took {upload.seconds} seconds; do not edit uploads"
    if upload.epsilon is not None and not 0 < upload.epsilon < math.inf:
        return f"it spent a privacy budget of {upload.epsilon}; do not edit uploads"
    counts = upload.class_counts
    if counts is None:
        return None
    if len(counts) != num_classes:
        return f"{len(counts)} class counts for model.num-classes = {num_classes}; they must be equal on both sides"
    if min(counts) < 0 or sum(counts) != upload.num_examples:
        return f"its class counts {list(counts)} are no split of its {upload.num_examples} images; do not edit uploads"
    return None


def extras_like(weights: Mapping[str, Tensor], asked: UploadConfig) -> dict[str, Tensor]:
    """The tensors beside weights like these, without their numbers."""
    return moments.like(weights, asked) | (inputs.like(weights) if asked.moments else {})


def _wrong_statistics(upload: Upload, reference: Mapping[str, Tensor], asked: UploadConfig) -> str | None:
    tensors, wanted = upload.statistics or {}, extras_like(reference, asked)
    if set(tensors) != set(wanted):
        names = f"{_NAMES.repr(sorted(tensors))}, not {_NAMES.repr(sorted(wanted))}"
        return f"its statistics are {names} (upload.extras)"
    problem: str | None = None
    if sums := {name: tensors[name] for name in moments.names(asked)}:
        if upload.class_counts is None:
            return "statistics without class counts; run this app's own ClientApp there, which sends both"
        problem = moments.problem(sums, upload.class_counts, wanted)
    if asked.moments and not problem:
        layers = {name: tensors[name] for name in wanted if name not in sums}
        problem = _wrong_tensor(layers, {name: wanted[name] for name in layers}) or inputs.problem(layers)
    return problem


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(_NAMES.repr, keys[:3])) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(upload: Upload, path: Path, **more: str) -> None:
    """Write all tensors exactly as they were sent, the rest and `more` in the header; whole or not at all."""
    header: dict[str, object] = {**more, **{name: getattr(upload, name) for name in _KINDS}}
    statistics = {STATISTICS + name: tensor for name, tensor in (upload.statistics or {}).items()}
    if upload.statistics is not None:
        header["statistics"] = True
    save_tensors(path, {**upload.weights, **statistics}, header)


def load(path: Path) -> Upload:
    """Inverse of `save`, but the weights stay on disk until they are asked for, floating ones then as float32.

    Raises:
        RunError: the file is missing, corrupt or no upload.
    """
    try:
        return _from_file(StoredWeights(path))
    except DiskError:  # it may be as good as ever
        raise
    except RunError as error:
        raise RunError(f"{error}; {ASK_AGAIN}") from error
    except (KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{path} is not an upload; take it out of the uploads folder") from error


def _from_file(stored: StoredWeights) -> Upload:
    header = stored.header
    if any(type(header.get(name)) not in kinds for name, kinds in _KINDS.items()):
        raise TypeError
    counts = header["class_counts"]
    if counts is not None and not all(type(count) is int for count in counts):
        raise TypeError
    weights, statistics = stored.split(STATISTICS) if header.get("statistics") else (stored, None)
    return Upload(
        client=header["client"],
        weights=weights,
        num_examples=header["num_examples"],
        train_loss=float(header["train_loss"]),
        fingerprint=header["fingerprint"],
        class_counts=None if counts is None else tuple(counts),
        seconds=None if header.get("seconds") is None else float(header["seconds"]),
        epsilon=None if header.get("epsilon") is None else float(header["epsilon"]),
        statistics=statistics,
    )
