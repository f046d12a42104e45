"""The Flower ClientApp: train once and upload once; the same for the one-shot strategy and Flower's own."""

import json
import logging
import os
import re
from collections.abc import Callable
from functools import wraps
from hashlib import sha256
from pathlib import Path

import flwr
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmitr_flwr import pipeline
from fedmitr_flwr.client.private import require_opacus
from fedmitr_flwr.common.errors import ConfigError, DataError, UserError, printable
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.common.process import begin, forward
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.sections import OWN
from fedmitr_flwr.config.text import PLACES
from fedmitr_flwr.data.own import Place, look_at_own
from fedmitr_flwr.vit.build import Weights, initial_weights

from . import ledger

app = ClientApp()
log = logging.getLogger("fedmitr")
forward("fedmitr", logging.getLogger("flwr"))  # the core's progress appears where Flower's log does

RAISED = 2  # Flower's code for a ClientApp that raised
# What a --node-config may say. Any other key is a mistake, such as a limit that would not hold.
KEYS: tuple[str, ...] = ("client-name", "data-path", "image-column", "label-column", "work-path")
KEYS += ("max-epsilon", "max-delta", "partition-id", "num-partitions")
MAX_DELTA = 1e-5  # of a node that limits ε and does not say
# Quoted, or else up to the end of the clause: file names may hold spaces, times of day, and names of people.
_PATH = re.compile(
    r"""'(?=[^']*[/\\])(?:[^'\\]|\\.)*'|"(?=[^"]*[/\\])(?:[^"\\]|\\.)*"|[^\s'"]*[/\\].*?(?=[;:](?:\s|$)|$)"""
)

Answer = Callable[[Message, Context], Message]
Numbers = int | float | list[int] | list[float]


def discreet(answer: Answer) -> Answer:
    """Let no path and no data leave in the text of an error; the whole error is in the client's own log."""

    @wraps(answer)
    def guarded(message: Message, context: Context) -> Message:
        begin(log)
        try:
            return answer(message, context)
        except Exception as error:
            return Message(Error(RAISED, _public_message(error)), reply_to=message)

    return guarded


def _public_message(error: Exception) -> str:
    """What the server may read of an error, which is logged here as a whole."""
    if isinstance(error, UserError):
        log.error("%s", error)
        return printable(_PATH.sub("<path>", " ".join(str(error).split())))
    log.error("the client failed", exc_info=error)
    return type(error).__name__


@app.query("describe")
@discreet
def describe(message: Message, context: Context) -> Message:
    """Say which client this node is, and what keeps it from taking part: the server knows if it is needed at all.

    Where it has images of its own, it looks at them before anybody trains.
    """
    name = _name(context)
    card: dict[str, Numbers] = {"fingerprint": int(core(), 16), "own-data": int(_place(context) is not None)}
    texts = ConfigRecord({"name": name, "flwr": flwr.__version__})
    try:
        if not name:
            card |= dict(zip(("partition-id", "num-partitions"), _numbers(context), strict=True))
        if "config" in message.content:
            _look(message, context)
    except Exception as error:
        texts["trouble"] = _public_message(error)
    return Message(RecordDict({"card": MetricRecord(card), "name": texts}), reply_to=message)


def _look(message: Message, context: Context) -> None:
    """Raise what would keep this client from training, before anybody trains."""
    _, config = _order(message)
    _ledger(context, config)
    place = _place(context)
    if place and config.partition.scheme == OWN:
        try:
            look_at_own(place, config)
        except DataError as error:
            raise DataError(f"client {_name(context) or _numbers(context)[0]}: {error}") from error


@app.train()
@discreet
def train(message: Message, context: Context) -> Message:
    """Train on this client's images and upload the result."""
    order, config = _order(message)
    ours, client = _ledger(context, config), _client(context, order)
    upload = pipeline.train_client(
        config,
        client,
        _weights(message, config),
        place=_place(context),
        keep=_keep(context, config, client),
        server_round=int(order.get("server-round", 1)),  # type: ignore[arg-type]
        prox_mu=float(order.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    if ours:
        ours.note(upload, config.privacy.delta, _digest(config))
    numbers: dict[str, Numbers] = {
        "num-examples": upload.num_examples,
        "train_loss": upload.train_loss,
        "partition-id": client,
        "fingerprint": int(upload.fingerprint, 16),
        "seconds": upload.seconds or 0.0,
    }
    if upload.epsilon is not None:
        numbers["epsilon"] = upload.epsilon
    if upload.class_counts is not None:
        numbers["class-counts"] = list(upload.class_counts)
    content = RecordDict({"arrays": ArrayRecord(dict(upload.weights)), "metrics": MetricRecord(numbers)})
    if upload.statistics is not None:
        content["statistics"] = ArrayRecord(dict(upload.statistics))
    return Message(content, reply_to=message)


@app.evaluate()
@discreet
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's held-out images."""
    order, config = _order(message)
    _require_privacy(context, config)
    found = pipeline.evaluate_client(config, _client(context, order), _weights(message, config), _place(context))
    numbers: dict[str, Numbers] = {"num-examples": found.num_examples, "accuracy": found.accuracy}
    numbers["eval_loss"] = found.loss
    if config.upload.counts:  # recall by class would tell which classes this client has
        numbers["recall"] = list(found.per_class)
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


def _order(message: Message) -> tuple[ConfigRecord, Config]:
    """What the server wants: Flower's record of the round, and the settings that a client needs.

    Raises:
        ConfigError: the server runs other code, or is no server of this app. Its settings are not read then.
    """
    order: ConfigRecord = message.content.config_records.get("config", ConfigRecord())
    theirs = order.get("fingerprint")
    if theirs != core().encode():
        code = theirs.decode(errors="replace")[:12] if isinstance(theirs, bytes) else "which it does not tell"
        raise ConfigError(
            f"the server runs other code ({code}) than this client ({core()}); "
            "restart the SuperLink and its SuperNodes from one checkout"
        )
    return order, Config.from_toml(bytes(order["toml"]).decode())  # type: ignore[arg-type]


def _require_privacy(context: Context, config: Config) -> tuple[float, float] | None:
    """The server writes the settings; the node has the last word on how much its upload may reveal.

    Returns the node's limits, as of `_limits`.

    Raises:
        ConfigError: the server asks for more than the node's `max-epsilon` and `max-delta`, these or another key of
            its --node-config cannot be, or the library is missing.
    """
    limits = _limits(context)
    require_opacus(config)
    if limits is None:
        return None
    epsilon, delta = limits
    if not 0 < config.privacy.epsilon <= epsilon:
        raise ConfigError(
            f"this node wants privacy.epsilon of at most {epsilon:g}, and the server's is {config.privacy.epsilon:g} "
            "(0: none); lower it there, or raise the node's max-epsilon"
        )
    if config.privacy.delta > delta:
        raise ConfigError(
            f"this node wants privacy.delta of at most {delta:g}, and the server's is {config.privacy.delta:g}; "
            "lower it there, or raise the node's max-delta"
        )
    return limits


def _limits(context: Context) -> tuple[float, float] | None:
    """The greatest ε and δ that the node's --node-config allows; None where it sets no limit."""
    node = context.node_config
    if unknown := sorted(set(node) - set(KEYS)):
        raise ConfigError(f"this node's --node-config has {unknown[0]!r}, which nothing reads; use {', '.join(KEYS)}")
    if "max-epsilon" not in node:
        if "max-delta" in node:
            raise ConfigError("this node's max-delta limits nothing by itself; give a max-epsilon with it")
        return None
    epsilon, delta = node["max-epsilon"], node.get("max-delta", MAX_DELTA)
    _require_above_0("max-epsilon", epsilon, "or leave it out for no limit")
    _require_above_0("max-delta", delta, f"or leave it out for {MAX_DELTA:g}")
    return float(epsilon), float(delta)


def _require_above_0(key: str, value: object, otherwise: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"this node's {key} = {value!r} is not possible; use a number above 0, {otherwise}")


def _name(context: Context) -> str:
    return str(context.node_config.get("client-name", ""))


def _numbers(context: Context) -> tuple[int, int]:
    """This node's client number, and how many clients there are."""
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as error:
        fix = "start the SuperNode with --node-config 'partition-id=0 num-partitions=2' and numbers of its own"
        raise ConfigError(f"the node has no {error.args[0]}; {fix}, or with a client-name") from error


def _client(context: Context, order: ConfigRecord) -> int:
    """This node's client number: its own, or, where it has a name, what the server has made of that."""
    if not _name(context):
        return _numbers(context)[0]
    number = order.get("client")
    if not isinstance(number, int):
        raise ConfigError(f"the server does not say which client {_name(context)!r} is; is it in its flower.clients?")
    return number


def _place(context: Context) -> Place | None:
    """Where this node's own images lie, if its operator named a place."""
    node = context.node_config
    if "data-path" not in node:
        return None
    return Place(*(str(node.get(key, "")) for key in ("data-path", "image-column", "label-column")))


def _keep(context: Context, config: Config, client: int) -> Path | None:
    """Where this client's upload is kept: with images of its own, in its node's `work-path`, by default FLWR_HOME."""
    if config.partition.scheme != OWN or config.flower.strategy != "oneshot":
        return None
    who = re.sub(r"[^\w.-]", "_", _name(context) or str(client))
    return _work_path(context) / f"upload_{who}.safetensors"


def _work_path(context: Context) -> Path:
    folder = context.node_config.get("work-path") or Path(os.environ.get("FLWR_HOME", "~/.flwr")) / "fedmitr"
    return Path(str(folder)).expanduser()


def _ledger(context: Context, config: Config) -> ledger.Ledger | None:
    """Where this node notes what it spends, and which has room for this order; None where it sets no limit.

    Raises:
        ConfigError: there is no room, or `_require_privacy`.
    """
    limits = _require_privacy(context, config)
    if limits is None:
        return None
    place = _place(context)
    if place:
        data = str(Path(place.path).expanduser().resolve())
    else:
        who = _name(context) or "client {} of {}".format(*_numbers(context))
        data = f"share of {who} in {config.data.source} {config.data.path}".strip()
    found = ledger.Ledger(_work_path(context) / ledger.NAME, data, limits[0])
    found.require_room(config.privacy.epsilon, _digest(config))
    return found


def _digest(config: Config) -> str:
    """Which order this is: equal where the same upload is asked for again."""
    decisive = {key: value for key, value in config.to_flat().items() if key not in PLACES}
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _weights(message: Message, config: Config) -> Weights:
    """The weights that came along; without any, the public ones that the seed decides."""
    arrays = message.content.array_records.get("arrays")
    return dict(arrays.to_torch_state_dict()) if arrays else initial_weights(config.model, config.seed)
