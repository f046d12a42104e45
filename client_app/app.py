"""The Flower ClientApp: train once and upload once; the same for the one-shot strategy and Flower's own."""

import logging
import re
from collections.abc import Callable
from functools import wraps

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.errors import ConfigError, UserError
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.training.upload import Weights
from fedmitr_flwr.vit.build import initial_weights

app = ClientApp()
log = logging.getLogger("flwr")
logging.getLogger("fedmitr").parent = log  # the core's progress appears where Flower's log does

RAISED = 2  # Flower's code for a ClientApp that raised
# Quoted, or else up to the next punctuation mark: file names may hold spaces, and names of people.
_PATH = re.compile(r"""'[^']*[/\\][^']*'|"[^"]*[/\\][^"]*"|[^\s'"]*[/\\][^;:]*""")

Answer = Callable[[Message, Context], Message]
Numbers = int | float | list[int] | list[float]


def discreet(answer: Answer) -> Answer:
    """Let no path and no data leave in the text of an error; the whole error is in the client's own log."""

    @wraps(answer)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except UserError as error:
            log.error("%s", error)
            told = _PATH.sub("<path>", " ".join(str(error).split()))
        except Exception as error:
            log.exception("the client failed")
            told = type(error).__name__
        return Message(Error(RAISED, told), reply_to=message)

    return guarded


@app.query("describe")
@discreet
def describe(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    client, clients = _identity(context)
    card = MetricRecord({"partition-id": client, "num-partitions": clients, "fingerprint": int(fingerprint(), 16)})
    return Message(RecordDict({"card": card}), reply_to=message)


@app.train()
@discreet
def train(message: Message, context: Context) -> Message:
    """Train on this client's images and upload the result."""
    order, config = _order(message)
    client, _ = _identity(context)
    upload = pipeline.train_client(
        config,
        client,
        _weights(message, config),
        server_round=int(order.get("server-round", 1)),  # type: ignore[arg-type]
        prox_mu=float(order.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    numbers: dict[str, Numbers] = {
        "num-examples": upload.num_examples,
        "train_loss": upload.train_loss,
        "partition-id": client,
        "fingerprint": int(upload.fingerprint, 16),
    }
    if upload.class_counts is not None:
        numbers["class-counts"] = list(upload.class_counts)
    content = RecordDict({"arrays": ArrayRecord(dict(upload.weights)), "metrics": MetricRecord(numbers)})
    return Message(content, reply_to=message)


@app.evaluate()
@discreet
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this client's held-out images."""
    _, config = _order(message)
    client, _ = _identity(context)
    found = pipeline.evaluate_client(config, client, _weights(message, config))
    numbers: dict[str, Numbers] = {
        "num-examples": found.num_examples,
        "accuracy": found.accuracy,
        "eval_loss": found.loss,
    }
    if config.upload.class_counts:  # recall by class would tell which classes this client has
        numbers["recall"] = list(found.per_class)
    return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)


def _order(message: Message) -> tuple[ConfigRecord, Config]:
    """What the server wants: Flower's record of the round, and the whole config that the server parsed."""
    order: ConfigRecord = message.content.config_records["config"]
    return order, Config.from_toml(bytes(order["toml"]).decode())  # type: ignore[arg-type]


def _identity(context: Context) -> tuple[int, int]:
    """This node's client number, and how many clients there are."""
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as error:
        fix = "start the SuperNode with --node-config 'partition-id=0 num-partitions=2' and numbers of its own"
        raise ConfigError(f"the node has no {error.args[0]}; {fix}") from error


def _weights(message: Message, config: Config) -> Weights:
    """The weights that came along; without any, the public ones that the seed decides."""
    arrays = message.content.array_records.get("arrays")
    return dict(arrays.to_torch_state_dict()) if arrays else initial_weights(config.model, config.seed)
