"""Flower's records: what is sent to the clients, and what they reply. The other half is client_app/app.py."""

import itertools
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmitr_flwr.common.errors import UploadError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.sections import OWN
from fedmitr_flwr.config.text import toml_value
from fedmitr_flwr.runs.evaluation import Evaluation
from fedmitr_flwr.uploads.foreign import raw, read_npy
from fedmitr_flwr.uploads.gate import shapes
from fedmitr_flwr.uploads.upload import Upload, extras_like, size
from fedmitr_flwr.vit.build import Weights

UPLOAD: Mapping[str, type] = {"arrays": ArrayRecord, "metrics": MetricRecord}  # what an upload consists of
EVALUATION: Mapping[str, type] = {"metrics": MetricRecord}

_OWN = "run this app's own ClientApp there"
_PLAIN = re.compile(r"[\w.-]{1,200}", re.ASCII)  # names that can be a tensor's in any file
_SAID = reprlib.Repr()  # of what is kept of a refused reply
_SAID.maxdict = _SAID.maxlist = 100
_SAID.maxstring = _SAID.maxother = 300
NEEDED = ("seed", "device", "partition.", "model.", "local.", "upload.", "privacy.", "evaluate.", "flower.strategy")
OWN_DATA = ("data.image-column", "data.label-column", "data.flip", "data.classes", "data.unknown-classes")
TELLS = 100_000  # characters of all that: it goes into a file's header, which cannot be large


def order(config: Config) -> ConfigRecord:
    """What the clients need of the settings, so that both sides cannot disagree, and which code they must run.

    That is what their data, training, upload and evaluation follow; no other client's name, no own path. In a
    simulation the shares of one data set are dealt out at the clients, which therefore need its path. A client gets the
    start's weights themselves, and of their file the name only: it says that there was one.
    """
    data = OWN_DATA if config.partition.scheme == OWN else ("data.",)
    needed = {key: value for key, value in config.to_flat().items() if key.startswith((*NEEDED, *data))}
    needed["model.weights"] = PurePath(config.model.weights).name
    toml = "".join(f"{key} = {toml_value(value)}\n" for key, value in needed.items())
    return ConfigRecord({"toml": toml.encode(), "fingerprint": core().encode()})  # bytes: Flower logs strings


def addressed(message: Message, client: int) -> Message:
    """The message with the client's number in its order: no client has the list of all names to find it in."""
    record = message.content.config_records.get("config")
    if record is not None:  # many messages share one
        message.content = RecordDict({**message.content, "config": ConfigRecord({**record, "client": client})})
    return message


def room(start: Weights) -> int:
    """The most bytes that arrays may have in an upload: twice what they take in float32, for names and headers."""
    return 2 * size(start) + 4096 * (len(start) + 1)


def read_upload(reply: Message, client: int, config: Config) -> Upload:
    """One client's upload, as it was sent. What the settings do not ask for is not looked at.

    Raises:
        UploadError: the reply is no upload, or names another client.
    """
    asked, start = config.upload, shapes(config.model)
    extras = extras_like(start, asked)
    _require_records(reply, client, {**UPLOAD, "statistics": ArrayRecord} if asked.sends_statistics else UPLOAD)
    records = reply.content.array_records
    numbers = reply.content.metric_records["metrics"]
    named = _get(numbers, "partition-id", int, client)
    if named != client:
        raise UploadError(f"client {client}: its upload says that it is client {named}'s; give every node its own id")
    return Upload(
        client=client,
        weights=_read_arrays(records["arrays"], client, room(start)),
        num_examples=_get(numbers, "num-examples", int, client),
        train_loss=_get(numbers, "train_loss", float, client),
        fingerprint=f"{_get(numbers, 'fingerprint', int, client):012x}",
        class_counts=_whole_numbers(numbers, "class-counts", client) if asked.counts else None,
        seconds=_get(numbers, "seconds", float, client),
        epsilon=_get(numbers, "epsilon", float, client) if "epsilon" in numbers else None,
        statistics=_read_arrays(records["statistics"], client, room(extras)) if asked.sends_statistics else None,
    )


def _read_arrays(arrays: ArrayRecord, client: int, limit: int) -> Weights:
    """Beyond `limit` bytes nothing is parsed."""
    if (sent := arrays.count_bytes()) > limit:
        raise UploadError(
            f"client {client}: it sent {sent} bytes of arrays, and a model of these settings has at most {limit}; "
            "server and client must have the same [model] settings"
        )
    weights: Weights = {}
    for name, array in arrays.items():
        try:
            weights[name] = read_npy(array.data)
        except UploadError as error:
            raise UploadError(f"client {client}: its array {reprlib.repr(name)} {error}; {_OWN}") from error
    return weights


def _require_records(reply: Message, client: int, wanted: Mapping[str, type]) -> None:
    sent = {name: type(record) for name, record in reply.content.items()}
    if sent != wanted:
        raise UploadError(f"client {client}: it sent {_records(sent)}, not {_records(wanted)}; {_OWN}")


def _records(kinds: Mapping[str, type]) -> str:
    shown = [f"{reprlib.repr(name)} ({kind.__name__})" for name, kind in sorted(kinds.items())[:4]]
    return ", ".join(shown) + " and more" * (len(kinds) > 4) or "no record"


@dataclass(frozen=True)
class Kept:
    """What of a refused reply goes to disk."""

    tensors: Weights
    said: dict[str, str]  # in words, what else was sent
    left_out: str = ""  # why there are no tensors


def keep(content: RecordDict, limit: int, most: int) -> Kept:
    """Choose what of a refused reply goes to disk.

    Its arrays go under their own names where those are plain, as bytes where they cannot be read; none if they are
    larger than `limit` or more than `most`, since a disk is soon full and a header is small. What else was sent goes
    in words, `TELLS` characters at most.
    """
    others = [(name, record) for name, record in content.items() if not isinstance(record, ArrayRecord)]
    words: list[tuple[str, object]] = [(_SAID.repr(name), dict(record)) for name, record in others]
    arrays = [(name, array) for record in content.array_records.values() for name, array in record.items()]
    sent = sum(len(array.data) for _, array in arrays)
    if sent > limit or len(arrays) > most:
        return Kept({}, _said(words), f"its {len(arrays)} arrays of {sent} bytes are too much to be kept")
    tensors: Weights = {}
    for free, (name, array) in zip(_names_in_file(name for name, _ in arrays), arrays, strict=True):
        try:
            tensors[free] = read_npy(array.data)
        except UploadError:
            tensors[free] = raw(array.data)
            words.append((free, (name, array.stype, array.dtype, array.shape)))
    return Kept(tensors, _said(words))


def _said(words: Iterable[tuple[str, object]]) -> dict[str, str]:
    """What a stranger said, as far as there is room for it."""
    said: dict[str, str] = {}
    left = TELLS
    for name, value in words:
        if left <= 0:
            break
        said[name] = text = _SAID.repr(value)[: max(0, left - len(name))]
        left -= len(name) + len(text)
    return said


def _names_in_file(sent: Iterable[str]) -> list[str]:
    """Each name itself where it is plain and the first of its kind; else a new one, that was not sent."""
    names = list(sent)
    plain = {name for name in names if _PLAIN.fullmatch(name)} - {"__metadata__"}
    new = (name for number in itertools.count() if (name := f"array-{number}") not in plain)
    free = []
    left = set(plain)
    for name in names:
        free.append(name if name in left else next(new))
        left.discard(name)
    return free


def read_evaluation(reply: Message, client: int, config: Config) -> Evaluation:
    """One client's evaluation; the recall by class is NaN where the client did not tell it.

    Raises:
        UploadError: the reply is no evaluation, or its numbers cannot be.
    """
    _require_records(reply, client, EVALUATION)
    numbers = reply.content.metric_records["metrics"]
    images = _get(numbers, "num-examples", int, client)
    accuracy, loss = (_get(numbers, key, float, client) for key in ("accuracy", "eval_loss"))
    num_classes = config.model.num_classes
    recall = tuple(_get(numbers, "recall", list, client)) if "recall" in numbers else (math.nan,) * num_classes
    possible = 0 <= accuracy <= 100 and math.isfinite(loss) and len(recall) == num_classes
    if not possible or not 1 <= images <= config.screen.max_images:
        raise UploadError(
            f"client {client}: its evaluation is {accuracy} % of {images} images, loss {loss}, recall of "
            f"{len(recall)} classes, which cannot be; {_OWN}"
        )
    return Evaluation(accuracy=accuracy, loss=loss, per_class=recall, num_examples=images)


def _get(numbers: Any, key: str, kind: type, client: int) -> Any:
    value = numbers.get(key)
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind):
        raise UploadError(
            f"client {client}: its upload has {key} = {reprlib.repr(value)}; it must be a {kind.__name__}; {_OWN}"
        )
    return value


def _whole_numbers(numbers: Any, key: str, client: int) -> tuple[int, ...]:
    values = _get(numbers, key, list, client)
    if not all(type(value) is int for value in values):
        raise UploadError(f"client {client}: its upload has {key} = {reprlib.repr(values)}, no whole numbers; {_OWN}")
    return tuple(values)
