"""One round: every client uploads once, every upload is on disk the moment it arrives, then the server phase runs."""

import time
from collections.abc import Iterable, Mapping
from logging import getLogger
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmitr_flwr import pipeline
from fedmitr_flwr.errors import RunError, UserError
from fedmitr_flwr.fingerprint import fingerprint
from fedmitr_flwr.report.run_folder import RunFolder
from fedmitr_flwr.training.upload import Weights, validate

from .grid import ObservedGrid
from .records import read_evaluation, read_upload, read_weights

log = getLogger("flwr")

DAY = 86400.0


class OneShot(Strategy):
    """Ask the clients whose upload is not on disk, keep what they send, and run the method on it."""

    def __init__(self, folder: RunFolder, nodes: Mapping[int, int], initial: Weights) -> None:
        """Prepare one run.

        Args:
            folder: of the run; its config says how many clients there are.
            nodes: client -> node id, of the clients that can be asked.
            initial: the weights that every client starts from.
        """
        self.folder, self.config, self.initial = folder, folder.config, initial
        self.nodes = dict(nodes)
        self.clients = {node: client for client, node in nodes.items()}
        self.result: dict[str, Any] = {}

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Flower's own loop, held to one round. Arguments as in `Strategy.start` of any version."""
        if len(args) > 1:  # initial_arrays, num_rounds, ...
            args = (args[0], 1, *args[2:])
        else:
            kwargs["num_rounds"] = 1
        kwargs.setdefault("timeout", self.config.flower.upload_timeout)
        return super().start(ObservedGrid(grid, self.receive, self.clients), *args, **kwargs)

    def summary(self) -> None:
        config, missing = self.config, self.folder.missing(self.config.partition.clients)
        log.info("\t├── Method: %s, seed %d", config.method, config.seed)
        log.info(
            "\t├── Clients: %d, uploads on disk: %d", config.partition.clients, config.partition.clients - len(missing)
        )
        log.info("\t└── Run folder: %s", self.folder.path)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        del grid  # the nodes are known
        missing = self.folder.missing(self.config.partition.clients)
        asked = [client for client in missing if client in self.nodes]
        log.info("asking %d of %d clients: %s", len(asked), self.config.partition.clients, asked or "all have uploaded")
        config["server-round"] = server_round
        return self._messages(asked, MessageType.TRAIN, arrays, config)

    def _messages(self, clients: Iterable[int], kind: str, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
        content = RecordDict({"arrays": arrays, "config": config})
        # A message that outlives the wait, or Flower would drop the reply of a long training.
        ttl = max(DAY, 2 * self.config.flower.upload_timeout)
        return [Message(content, self.nodes[client], kind, ttl=ttl) for client in clients]

    def receive(self, reply: Message, node: int) -> None:
        """Write one upload to disk, accepted or refused, and free its memory."""
        if reply.metadata.message_type != MessageType.TRAIN:
            return
        client, started = self.clients[node], time.monotonic()
        try:
            self._keep(reply, client)
        except UserError as error:
            path = self.folder.refuse_upload(f"client {client}", _readable_weights(reply, client), str(error))
            log.warning("refused: %s (kept in %s)", error, path)
        for name in list(reply.content.array_records):
            reply.content[name] = ArrayRecord()
        log.debug("client %d: taken in %.2f s", client, time.monotonic() - started)

    def _keep(self, reply: Message, client: int) -> None:
        config = self.config
        upload = read_upload(reply, client, config.upload.class_counts)
        validate(upload, self.initial, config.model.num_classes, fingerprint(), config.partition.clients)
        path = self.folder.save_upload(upload)
        self.folder.log_metrics(
            stage="upload", client=client, bytes=upload.num_bytes, images=upload.num_examples, loss=upload.train_loss
        )
        log.info("client %d: %.2f MB on disk, %s", client, upload.num_bytes / 1e6, path.name)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        del server_round, replies  # taken as they arrived
        self.folder.require_uploads(self.config.flower.quorum)
        outcome = pipeline.serve(self.folder)
        self.result = outcome.result
        if outcome.weights is None and self.config.evaluate.where == "clients":
            raise RunError(
                f"method = {self.config.method!r} makes no single model for clients to evaluate; "
                "use evaluate.where = 'server'"
            )
        accuracy = outcome.result["accuracy"]
        numbers = {name: value for name in ("student", "fedavg", "ensemble") if (value := accuracy[name]) is not None}
        metrics = MetricRecord({"uploads": len(self.folder.upload_paths()), **numbers})
        return (None if outcome.weights is None else ArrayRecord(dict(outcome.weights))), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        del grid
        if self.config.evaluate.where != "clients":
            return []
        config["server-round"] = server_round
        return self._messages(self.nodes, MessageType.EVALUATE, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        del server_round
        if self.config.evaluate.where != "clients":
            return None
        evaluations = [
            read_evaluation(reply, self.config.model.num_classes) for reply in replies if reply.has_content()
        ]
        if not evaluations:
            raise RunError("no client evaluated the model, and evaluate.where = 'clients'; see the failures above")
        self.result = pipeline.conclude_on_clients(self.folder, evaluations)
        return MetricRecord({"accuracy": self.result["accuracy"]["student"], "clients": len(evaluations)})


def _readable_weights(reply: Message, client: int) -> Weights:
    """What can be kept of an upload that is refused."""
    try:
        return read_weights(reply, client)
    except UserError:
        return {}
