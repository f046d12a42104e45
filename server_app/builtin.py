"""Flower's own strategies in the same seat: same ClientApp, same settings, same run folder."""

import time
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy

from fedmitr_flwr.compute import resolve_device, threads
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.errors import ConfigError, RunError
from fedmitr_flwr.evaluation import Evaluation, evaluate
from fedmitr_flwr.report import result as report
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.vit.build import build_vit, initial_weights, timm_arguments

from .clients import Clients, meet
from .grid import ObservedGrid
from .records import order

log = getLogger("flwr")

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


def check(config: Config) -> None:
    """Raise ConfigError for what Flower's strategies cannot do."""
    name = config.flower.strategy
    if name not in STRATEGIES:
        raise ConfigError(f"flower.strategy = {name!r} is unknown; use oneshot | {' | '.join(STRATEGIES)}")
    if config.resume_from:
        raise ConfigError(f"resume-from needs flower.strategy = 'oneshot'; {name} starts from the beginning")
    if config.upload.dtype != "float32":
        raise ConfigError(
            f"upload.dtype = {config.upload.dtype!r}: {name} would average in half precision; "
            "use 'float32', or flower.strategy = 'oneshot'"
        )


def run(grid: Grid, config: Config, run_id: int) -> None:
    """Run `config.flower.rounds` rounds of one of Flower's strategies."""
    clients = meet(grid, config.flower)
    config = config.with_clients(clients.number)
    folder = RunFolder.create(config, f"{config.flower.strategy}-{run_id}")
    log.info("run folder: %s", folder.path)
    session = _Session(folder, clients)
    initial = ArrayRecord(dict(initial_weights(config.model, config.seed)))
    result = _strategy(config).start(
        grid=session.grid(grid),
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
    at_clients = config.evaluate.where == "clients"
    return make(
        fraction_train=1.0,
        fraction_evaluate=float(at_clients),
        min_train_nodes=config.flower.min_nodes,
        min_evaluate_nodes=config.flower.min_nodes if at_clients else 0,
        min_available_nodes=config.flower.min_nodes,
        **settings,
    )


class _Session:
    """What is counted and evaluated while a strategy runs."""

    def __init__(self, folder: RunFolder, clients: Clients) -> None:
        self.folder, self.config, self.clients = folder, folder.config, clients
        self.device = resolve_device(self.config.device)
        self.bytes_up = dict.fromkeys(clients.nodes, 0)
        self.started = time.monotonic()
        self.last: Evaluation | None = None

    def grid(self, inner: Grid) -> ObservedGrid:
        nodes = {node: client for client, node in self.clients.nodes.items()}

        def count(reply: Message, node: int) -> None:
            if reply.metadata.message_type == MessageType.TRAIN and node in nodes:
                self.bytes_up[nodes[node]] += sum(one.count_bytes() for one in reply.content.array_records.values())

        return ObservedGrid(inner, count, nodes, quorum=self.config.flower.quorum)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower's hook: the global model on the server's test images after each round."""
        if not server_round:
            return None
        config = self.config
        vit = build_vit(config.model)
        vit.load_state_dict(arrays.to_torch_state_dict())
        images, model = load(config.data, config.model).test, config.model
        with threads(config.threads):
            self.last = evaluate(
                vit.to(self.device), images, model.img_size, model.num_classes, config.evaluate.batch_size, self.device
            )
        self.folder.log_metrics(round=server_round, accuracy=self.last.accuracy, loss=self.last.loss)
        return MetricRecord({"accuracy": self.last.accuracy, "eval_loss": self.last.loss})

    def finish(self, flower_result: Result) -> str:
        """Write the model and result.json; return the accuracy table."""
        weights = {name: tensor.float() for name, tensor in flower_result.arrays.to_torch_state_dict().items()}
        if not weights:
            raise RunError(f"flower.strategy = {self.config.flower.strategy!r} made no model; see the failures above")
        self.folder.save_model(weights, timm_arguments(self.config.model))
        result = report.build(
            config=self.config,
            device=str(self.device),
            bytes_up=list(self.bytes_up.values()),
            seconds={"rounds": time.monotonic() - self.started},
            **self._scores(flower_result),
        )
        result["method"] = self.config.flower.strategy
        self.folder.write_result(result)
        return report.accuracy_table(result)

    def _scores(self, flower_result: Result) -> dict[str, Any]:
        if self.last is not None:
            data = load(self.config.data, self.config.model)
            return {
                "student": self.last.accuracy,
                "per_class": dict(zip(data.classes, self.last.per_class, strict=True)),
                "evaluated_on": report.on_server(self.config.data, len(data.test)),
            }
        rounds = flower_result.evaluate_metrics_clientapp
        for server_round, metrics in sorted(rounds.items()):
            self.folder.log_metrics(round=server_round, accuracy=metrics["accuracy"], loss=metrics["eval_loss"])
        accuracy: Any = rounds[max(rounds)]["accuracy"] if rounds else None
        return {"student": accuracy}
