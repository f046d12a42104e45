"""Flower's own strategies in the same seat: same ClientApp, same settings, same run folder."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.compute import forget_peak, peak_memory, resolve_device, threads
from fedmitr_flwr.common.errors import RunError, UploadError
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.sections import OWN
from fedmitr_flwr.data.shares import class_names, server_images
from fedmitr_flwr.judge import evaluate_on
from fedmitr_flwr.methods.contract import Stopwatch
from fedmitr_flwr.publish.hub import save_model, write_result
from fedmitr_flwr.runs import result as report
from fedmitr_flwr.runs.evaluation import Evaluation
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.gate import require_loss, require_model, shapes
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import Weights, build_vit

from .clients import FEWEST, Clients, meet, with_number_of
from .grid import ObservedGrid
from .intake import checked
from .records import order, read_evaluation

log = getLogger("flwr")

_FIX = "lower local.lr, or eta in flower.options"

# Flower's class, and what it is given where Flower's default is none or would make it plain FedAvg.
STRATEGIES: Mapping[str, tuple[Callable[..., Strategy], Mapping[str, float]]] = {
    "fedavg": (flower.FedAvg, {}),
    "fedprox": (flower.FedProx, {"proximal_mu": 0.1}),
    "fedadam": (flower.FedAdam, {"eta": 0.01}),
    "fedyogi": (flower.FedYogi, {}),
    "fedadagrad": (flower.FedAdagrad, {"eta": 0.01}),
    "fedavgm": (flower.FedAvgM, {"server_momentum": 0.9}),
    "fedmedian": (flower.FedMedian, {}),
    "fedtrimmedavg": (flower.FedTrimmedAvg, {}),
    "krum": (flower.Krum, {"num_malicious_nodes": 1}),
    "qfedavg": (flower.QFedAvg, {"client_learning_rate": 0.01}),
}


def run(grid: Grid, config: Config, run_id: int) -> None:
    """Run `config.flower.rounds` rounds of one of Flower's strategies."""
    clients = meet(grid, config)
    config = with_number_of(clients, config)
    initial = ArrayRecord(dict(pipeline.start_of(config)))  # first: what cannot be had leaves no folder
    folder = pipeline.created(config, f"{config.flower.strategy}-{run_id}")
    log.info("run folder: %s", folder.path)
    with folder.at_work():
        checked_grid = _CheckedGrid(grid, clients, config)
        session = _Session(folder, checked_grid)
        result = session.timed(_strategy(config)).start(
            grid=checked_grid,
            initial_arrays=initial,
            num_rounds=config.flower.rounds,
            timeout=config.flower.upload_timeout,
            train_config=order(config),
            evaluate_config=order(config),
            evaluate_fn=session.evaluate if config.evaluate.where == "server" else None,
        )
        table = session.finish(result)
    log.info("\n%s\n\nrun folder: %s", table, folder.path)


def _strategy(config: Config) -> Strategy:
    make, settings = STRATEGIES[config.flower.strategy]
    settings = {**settings, **config.flower.strategy_options()}
    at_clients = config.evaluate.where == "clients"
    return make(
        fraction_train=1.0,
        fraction_evaluate=float(at_clients),
        min_train_nodes=FEWEST,
        min_evaluate_nodes=FEWEST if at_clients else 0,
        min_available_nodes=FEWEST,
        **settings,
    )


def _size(message: Message) -> int:
    """Bytes of all arrays in a message, without what Flower wraps them in."""
    arrays = [array for record in message.content.array_records.values() for array in record.values()]
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)


def _trained(upload: Upload, start: Weights) -> RecordDict:
    """An upload that was checked, with nothing in it but what Flower's strategies read.

    They take the arrays in the order in which they come, and give up the whole round where one client has a number
    more than the others.

    Raises:
        UploadError: it fits one shot, and no strategy of Flower's.
    """
    if other := [name for name in start if upload.weights[name].dtype != start[name].dtype]:
        raise UploadError(f"client {upload.client}: {other[0]} is in half precision; use upload.dtype = 'float32'")
    if upload.train_loss < 0:
        raise UploadError(f"client {upload.client}: its training loss is {upload.train_loss}; do not edit uploads")
    arrays = ArrayRecord({name: upload.weights[name] for name in start})
    numbers = MetricRecord({"num-examples": upload.num_examples, "train_loss": upload.train_loss})
    return RecordDict({"arrays": arrays, "metrics": numbers})


class _CheckedGrid(ObservedGrid):
    """Shows a strategy the clients only, checks and counts what they send, and counts what they get."""

    def __init__(self, inner: Grid, clients: Clients, config: Config) -> None:
        nodes = {node: client for client, node in clients.nodes.items()}
        super().__init__(inner, self.take, nodes, quorum=config.flower.quorum)
        self.config, self.shapes = config, shapes(config.model)
        self.bytes_up, self.bytes_down = dict.fromkeys(clients.nodes, 0), dict.fromkeys(clients.nodes, 0)
        self.client_seconds = dict.fromkeys(clients.nodes, 0.0)
        self.held: dict[int, int] = {}  # images that each client evaluated on
        self.asked_for: dict[int, str] = {}  # node -> message type; what a reply calls itself does not matter

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node in self.clients]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        kept = list(messages)
        for message in kept:
            sent = message.metadata
            self.asked_for[sent.dst_node_id] = sent.message_type
            if sent.message_type == MessageType.TRAIN:
                self.bytes_down[self.clients[sent.dst_node_id]] += _size(message)
        return super().push_messages(kept)

    def take(self, reply: Message, node: int) -> None:
        """Leave in a reply what the strategy needs, or raise UploadError."""
        client = self.clients[node]
        try:
            if self.asked_for[node] == MessageType.TRAIN:
                upload = checked(reply, client, node, self.config)
                reply.content = _trained(upload, self.shapes)
                self.bytes_up[client] += upload.num_bytes
                self.client_seconds[client] += upload.seconds or 0.0
            else:
                found = read_evaluation(reply, client, self.config)
                numbers: dict[str, Any] = {"num-examples": found.num_examples, "accuracy": found.accuracy}
                reply.content = RecordDict({"metrics": MetricRecord(numbers | {"eval_loss": found.loss})})
                self.held[client] = found.num_examples
        except UploadError:
            raise
        except Exception as error:  # an unforeseen error must not let a reply through
            problem = f"client {client}: its reply cannot be checked ({type(error).__name__}); see the log"
            raise UploadError(problem) from error


class _Session:
    """What is timed and evaluated while a strategy runs, and what is told of it at the end."""

    def __init__(self, folder: RunFolder, grid: _CheckedGrid) -> None:
        self.folder, self.config, self.grid = folder, folder.config, grid
        self.device = resolve_device(self.config.device)
        self.stopwatch, self.started = Stopwatch(), time.monotonic()
        self.last: Evaluation | None = None
        forget_peak(self.device)

    def timed(self, strategy: Strategy) -> Strategy:
        """The strategy itself, whose aggregation is timed from now on."""
        aggregate = strategy.aggregate_train

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.stopwatch.stage("aggregation"):
                return aggregate(*args, **kwargs)

        strategy.aggregate_train = counted  # type: ignore[method-assign]
        return strategy

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's hook: the global model on the server's test images after each round."""
        if not server_round:
            return None
        config = self.config
        vit = build_vit(config.model)
        vit.load_state_dict(arrays.to_torch_state_dict())  # some strategies make float64 of them
        with threads(config.threads), self.stopwatch.stage("evaluation"):
            self.last = evaluate_on(vit, server_images(config)[0], config, self.device)
        self.folder.log_metrics(round=server_round, accuracy=self.last.accuracy, loss=self.last.loss)
        return MetricRecord({"accuracy": self.last.accuracy, "eval_loss": self.last.loss})

    def finish(self, flower_result: Result) -> str:
        """Write the model and result.json; return the accuracy table."""
        weights = {name: tensor.float() for name, tensor in flower_result.arrays.to_torch_state_dict().items()}
        if not weights:
            raise RunError(f"flower.strategy = {self.config.flower.strategy!r} made no model; see the failures above")
        require_model(weights, self.config.model, _FIX)
        if self.last is not None:
            require_loss(self.last.loss, _FIX)
        save_model(self.folder, weights, class_names(self.config))
        dealt_here = self.config.evaluate.where == "server" and self.config.partition.scheme != OWN
        result = report.build(
            config=self.config,
            device=str(self.device),
            bytes_up=self._by_client(self.grid.bytes_up),
            bytes_down=self._by_client(self.grid.bytes_down),
            client_seconds=self._by_client(self.grid.client_seconds),
            server_seconds=self.stopwatch.seconds.get("aggregation", 0.0),
            peak_memory=peak_memory(self.device),
            seconds={"rounds": time.monotonic() - self.started, **self.stopwatch.seconds},
            **self._scores(flower_result),
            **(pipeline.dealt(self.config) if dealt_here else {}),
        )
        result["method"] = self.config.flower.strategy
        write_result(self.folder, result)
        return report.accuracy_table(result)

    def _by_client(self, counted: Mapping[int, Any]) -> list[Any]:
        """None for a client that was not there."""
        return [counted.get(client) for client in range(self.config.partition.clients)]

    def _scores(self, flower_result: Result) -> dict[str, Any]:
        if self.last is not None:
            images, classes = server_images(self.config)
            return {
                "student": self.last.accuracy,
                "per_class": dict(zip(classes, self.last.per_class, strict=True)),
                "confusion": self.last.confusion,
                "calibration": self.last.calibration,
                "evaluated_on": report.on_server(self.config.data, len(images)),
            }
        rounds = flower_result.evaluate_metrics_clientapp
        for server_round, metrics in sorted(rounds.items()):
            self.folder.log_metrics(round=server_round, accuracy=metrics["accuracy"], loss=metrics["eval_loss"])
        accuracy: Any = rounds[max(rounds)]["accuracy"] if rounds else None
        return {"student": accuracy, "evaluated_on": {"where": "clients", "images": sum(self.grid.held.values())}}
