"""A Flower grid in one process: it calls the ClientApp at once, so a whole federation runs without Ray in a moment."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tiny import RECIPE

Tamper = Callable[[Message, int], Iterable[Message]]


def server_context(run_config: dict[str, Any], run_id: int = 1) -> Context:
    return Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


@contextmanager
def task_identity() -> Iterator[None]:
    """What Flower sets in each of its processes, and messages cannot be made without."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def complaint(reply: Message) -> str:
    """What a client says is wrong: the text of its error or, where it describes itself, of its card; or nothing."""
    return reply.error.reason if reply.has_error() else str(reply.content.get("name", {}).get("trouble", ""))


class LocalGrid(Grid):
    """`count` simulated nodes around one ClientApp."""

    def __init__(
        self,
        client_app: ClientApp,
        count: int,
        *,
        tamper: Tamper | None = None,
        shuffle: Callable[[list[Any]], None] = lambda _: None,
    ) -> None:
        """Make the nodes.

        Args:
            client_app: run for every message.
            count: nodes; node 1000 + 7 * i is client i, so that the two cannot be mistaken for each other.
            tamper: (reply, client) -> the replies that arrive in its place: none, one or several.
            shuffle: puts a list of replies into the order of arrival.
        """
        self.client_app, self.tamper, self.shuffle = client_app, tamper, shuffle
        self.contexts = {self.node(i): self._context(i, count) for i in range(count)}
        self.asked: list[tuple[str, int]] = []  # (message type, client), in the order of asking
        self._arrived: dict[str, list[Message]] = {}
        self._run: Any = None

    @staticmethod
    def node(client: int) -> int:
        return 1000 + 7 * client

    @staticmethod
    def client(node: int) -> int:
        return (node - 1000) // 7

    def _context(self, client: int, count: int) -> Context:
        config: UserConfig = {"partition-id": client, "num-partitions": count}
        return Context(1, self.node(client), config, RecordDict(), {})

    def clients_asked(self, message_type: str) -> list[int]:
        return sorted(client for kind, client in self.asked if kind == message_type)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise RuntimeError(f"Grid.create_message is deprecated in Flower; make a Message of {args} {kwargs}")

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> str:
        told = message.metadata
        told.__dict__["_message_id"] = sent = str(uuid4())
        client = self.client(told.dst_node_id)
        self.asked.append((told.message_type, client))
        try:
            reply = self.client_app(message, self.contexts[told.dst_node_id])
        except Exception as error:  # as Flower does
            reply = Message(Error(code=2, reason=repr(error)), reply_to=message)
        replies = self.tamper(reply, client) if self.tamper and told.message_type != "query.describe" else [reply]
        self._arrived[sent] = list(replies)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = [reply for sent in list(message_ids) for reply in self._arrived.pop(sent, [])]
        self.shuffle(replies)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        del timeout
        return self.pull_messages(self.push_messages(messages))


TINY: dict[str, Any] = {
    "method": "fedavg",
    "device": "cpu",
    "threads": 1,
    "data.train-limit": 150,
    "data.test-limit": 40,
    "partition.scheme": "iid",
    "model.img-size": 8,
    "model.in-chans": 1,
    "model.num-classes": 10,
    "model.width": 32,
    "model.depth": 1,
    "model.patch-size": 4,
    **RECIPE,
    "inversion.steps": 4,
    "inversion.batch-size": 10,
    "inversion.stops": "0.3,0.6",
    "distill.rounds": 1,
    "distill.images-per-round": 10,
    "flower.node-wait": 1.0,
}
