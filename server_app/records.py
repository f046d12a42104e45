"""Flower's records: what the clients are told, and what they reply. The other half is client_app/app.py."""

import math
from typing import Any

from flwr.app import ConfigRecord, Message

from fedmitr_flwr.config import Config
from fedmitr_flwr.errors import UploadError
from fedmitr_flwr.evaluation import Evaluation
from fedmitr_flwr.training.upload import Upload, Weights

_ONE = "run this app's own ClientApp there, which sends one record of each kind"


def order(config: Config) -> ConfigRecord:
    """The whole config for the clients, so that both sides cannot disagree. Bytes, because Flower logs strings."""
    return ConfigRecord({"toml": config.to_toml().encode()})


def read_upload(reply: Message, client: int, with_counts: bool) -> Upload:
    """One client's upload, as it was sent.

    Args:
        reply: to a train message.
        client: whom the message was sent to.
        with_counts: read the class counts; without it they are not looked at.

    Raises:
        UploadError: the reply is no upload, or names another client.
    """
    numbers = _numbers(reply, client)
    named = _get(numbers, "partition-id", int, client)
    if named != client:
        raise UploadError(f"client {client}: its upload says that it is client {named}'s; give every node its own id")
    return Upload(
        client=client,
        weights=read_weights(reply, client),
        num_examples=_get(numbers, "num-examples", int, client),
        train_loss=_get(numbers, "train_loss", float, client),
        fingerprint=f"{_get(numbers, 'fingerprint', int, client):012x}",
        class_counts=tuple(_get(numbers, "class-counts", list, client)) if with_counts else None,
    )


def read_weights(reply: Message, client: int) -> Weights:
    """The one record of arrays, as tensors.

    Raises:
        UploadError: there is none or are several, or its bytes are no arrays.
    """
    records = list(reply.content.array_records.values())
    if len(records) != 1:
        raise UploadError(f"client {client}: {len(records)} records of arrays in its upload; {_ONE}")
    try:
        return dict(records[0].to_torch_state_dict())
    except (ValueError, TypeError, EOFError, OSError, KeyError) as error:  # whatever numpy makes of foreign bytes
        raise UploadError(f"client {client}: its arrays cannot be read; {_ONE}") from error


def read_evaluation(reply: Message, num_classes: int) -> Evaluation:
    """One client's evaluation; the recall by class is NaN where the client did not tell it."""
    numbers: Any = next(iter(reply.content.metric_records.values()))
    return Evaluation(
        accuracy=float(numbers["accuracy"]),
        loss=float(numbers["eval_loss"]),
        per_class=tuple(numbers.get("recall", [math.nan] * num_classes)),
        num_examples=int(numbers["num-examples"]),
    )


def _numbers(reply: Message, client: int) -> Any:
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise UploadError(f"client {client}: {len(records)} records of numbers in its upload; {_ONE}")
    return records[0]


def _get(numbers: Any, key: str, kind: type, client: int) -> Any:
    value = numbers.get(key)
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind):
        raise UploadError(f"client {client}: its upload has {key} = {value!r}; it must be a {kind.__name__}")
    return value
