"""One round: every client uploads once, every upload is on disk the moment it arrives, then the server phase runs."""

from collections.abc import Iterable, Mapping
from logging import getLogger
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.compute import return_memory
from fedmitr_flwr.common.errors import RunError, UploadError
from fedmitr_flwr.config.limits import needed
from fedmitr_flwr.runs.evaluation import Evaluation
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.gate import shapes
from fedmitr_flwr.uploads.upload import extras_like, size

from .grid import ObservedGrid
from .intake import take
from .records import read_evaluation

log = getLogger("flwr")

DAY = 86400.0


class OneShot(Strategy):
    """Ask the clients whose upload is not on disk, keep what they send, and run the method on it."""

    def __init__(self, folder: RunFolder, nodes: Mapping[int, int]) -> None:
        """`nodes` are, by client, those that can be asked; how many clients there are, the folder's config says."""
        self.folder, self.config = folder, folder.config
        self.shapes, self.collecting = shapes(folder.config.model), False
        self.nodes = dict(nodes)
        self.clients = {node: client for client, node in nodes.items()}
        self.sent = ArrayRecord()
        self.observed: ObservedGrid | None = None
        self.result: dict[str, Any] = {}

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Flower's own loop, held to one round. Arguments as in `Strategy.start` of any version."""
        if len(args) > 1:  # initial_arrays, num_rounds, ...
            args = (args[0], 1, *args[2:])
        else:
            kwargs["num_rounds"] = 1
        kwargs.setdefault("timeout", self.config.flower.upload_timeout)
        self.observed = ObservedGrid(grid, self.receive, self.clients, on_asked=self.forget_start)
        return super().start(self.observed, *args, **kwargs)

    def summary(self) -> None:
        config, missing = self.config, self.folder.missing()
        log.info("\t├── Method: %s, seed %d", config.method, config.seed)
        clients = config.partition.clients
        log.info("\t├── Clients: %d, uploads on disk: %d", clients, clients - len(missing))
        log.info("\t└── Run folder: %s", self.folder.path)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        del grid  # the nodes are known
        self.collecting, self.sent = True, arrays
        missing = self.folder.missing()
        asked = [client for client in missing if client in self.nodes]
        self.folder.require_room(len(asked), size(self.shapes | extras_like(self.shapes, self.config.upload)))
        log.info("asking %d of %d clients: %s", len(asked), self.config.partition.clients, asked or "all have uploaded")
        config["server-round"] = server_round
        return self._messages(asked, MessageType.TRAIN, arrays, config)

    def _messages(self, clients: Iterable[int], kind: str, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
        content = RecordDict({"arrays": arrays, "config": config})
        # A message that outlives the wait, or Flower would drop the reply of a long training.
        ttl = max(DAY, 2 * self.config.flower.upload_timeout)
        return [Message(content, self.nodes[client], kind, ttl=ttl) for client in clients]

    def forget_start(self) -> None:
        """Free what everybody has been sent, before a reply of the same size is fetched."""
        if self.sent and self.observed and self.observed.sends_copies:
            self.sent.clear()
            return_memory()

    def receive(self, reply: Message, node: int) -> None:
        """Take in a reply as it arrives; what it calls itself does not matter, but what was asked."""
        if self.collecting:
            take(reply, self.clients[node], node, self.folder)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        del server_round, replies  # taken as they arrived
        self.collecting = False
        self.folder.require_quorum()
        self.sent.clear()  # Flower holds on to the start, which is not needed any more
        outcome = pipeline.serve(self.folder)
        self.result = outcome.result
        if outcome.weights is None and self.config.evaluate.where == "clients":
            raise RunError(
                f"method = {self.config.method!r} makes no single model for clients to evaluate; "
                "use evaluate.where = 'server'"
            )
        accuracy = outcome.result["accuracy"]
        # Flower logs them as "ClientApp-side Train Metrics": the names say whose they are, and on which images.
        measured = f"server_{'validation' if self.config.data.validation else 'test'}_accuracy"
        numbers = {
            f"{measured}_{name}": value
            for name in ("student", "fedavg", "ensemble")
            if (value := accuracy[name]) is not None
        }
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
        evaluations = [found for reply in replies if reply.has_content() and (found := self._evaluation(reply))]
        wanted = needed(self.config.flower.quorum, self.config.partition.clients)
        if len(evaluations) < wanted:
            raise RunError(
                f"{len(evaluations)} clients evaluated the model, flower.quorum asks for {wanted}; see the failures "
                f"above, and run with resume-from = '{self.folder.root}' to ask them again"
            )
        self.result = pipeline.conclude_on_clients(self.folder, evaluations)
        return MetricRecord({"accuracy": self.result["accuracy"]["student"], "clients": len(evaluations)})

    def _evaluation(self, reply: Message) -> Evaluation | None:
        client = self.clients.get(reply.metadata.src_node_id, -1)  # a stranger's name for itself
        try:
            return read_evaluation(reply, client, self.config)
        except UploadError as error:
            log.warning("refused: %s", error)
            return None
