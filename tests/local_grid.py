"""A Flower grid in one process: it calls the ClientApp at once, so a whole federation runs without Ray in a moment."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tiny import RECIPE

from client_app.app import app as client_app
from fedmitr_flwr.common.errors import UserError
from fedmitr_flwr.config import Config
from fedmitr_flwr.runs.folder import RunFolder
from server_app.app import app as server_app

Tamper = Callable[[Message, int], Iterable[Message]]
Federate = Callable[..., RunFolder]

# What Flower sets in each of its processes, and messages cannot be made without.
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def server_context(run_config: dict[str, Any], run_id: int = 1) -> Context:
    return Context(run_id=run_id, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def of_two(**changes: Any) -> Config:
    """Settings of two clients."""
    return Config.from_flat(TINY | {"partition.clients": 2} | changes)


def federate(out: Path, grid: "LocalGrid", fails: str = "", **changes: Any) -> RunFolder | None:
    """Run the whole federation with changed settings; gives the newest run folder, also after a failure."""
    context = server_context(TINY | {"out-dir": str(out)} | changes, run_id=1 + len(list(out.glob("*"))))
    with pytest.raises(UserError, match=fails) if fails else nullcontext():
        server_app(grid, context)
    found = sorted(out.glob("*"), key=lambda path: path.stat().st_mtime)
    return RunFolder.open(found[-1]) if found else None


def complaint(reply: Message) -> str:
    """What a client says is wrong: in its error or, where it describes itself, on its card; or nothing."""
    return reply.error.reason if reply.has_error() else str(reply.content.get("name", {}).get("trouble", ""))


class LocalGrid(Grid):
    """`count` simulated nodes around one ClientApp."""

    def __init__(
        self,
        client_app: ClientApp,
        count: int,
        *,
        tamper: Tamper | None = None,
        cards: Tamper | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """Make the nodes.

        Args:
            client_app: run for every message.
            count: of nodes.
            tamper: (reply, client) -> the replies that arrive in its place: none, one or several.
            cards: the same for what the nodes say of themselves.
            rng: decides how late each reply is, and so in which order they arrive.
        """
        self.client_app, self.tamper, self.cards, self.rng = client_app, tamper, cards, rng
        self.contexts = {
            node: Context(1, node, {"partition-id": i, "num-partitions": count}, RecordDict(), {})
            for i, node in enumerate(map(self.node, range(count)))
        }
        self.asked: list[tuple[str, int]] = []  # (message type, client), in the order of asking
        self._arrived: dict[str, list[Message]] = {}
        self._late: Counter[str] = Counter()  # message id -> how many looks for the reply are in vain
        self._run: Any = None

    @staticmethod
    def node(client: int) -> int:
        """It cannot be mistaken for the client's number."""
        return 1000 + 7 * client

    @staticmethod
    def client(node: int) -> int:
        return (node - 1000) // 7

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
        describes = told.message_type == "query.describe"
        tamper = self.cards if describes else self.tamper
        self._arrived[sent] = list(tamper(reply, client)) if tamper else [reply]
        self._late[sent] = self.rng.randrange(3) if self.rng and not describes else 0
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for sent in list(message_ids):
            if self._late[sent]:
                self._late[sent] -= 1
            else:
                replies += self._arrived.pop(sent, [])
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        del timeout
        return self.pull_messages(self.push_messages(messages))


class Sites(LocalGrid):
    """Nodes with images of their own, that were started with these --node-configs."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        super().__init__(client_app, len(nodes))
        for client, told in enumerate(nodes):
            self.contexts[self.node(client)].node_config = told


def named(names: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Their --node-configs, as deploy/supernode.sh writes them."""
    return [{"client-name": name, "data-path": str(path)} for name, path in zip(names, folders, strict=True)]


TINY: dict[str, Any] = RECIPE | {"method": "fedavg", "device": "cpu", "threads": 1, "flower.node-wait": 1.0}
TINY |= {"data.train-limit": 150, "data.test-limit": 40, "partition.scheme": "iid"}
TINY |= {"model.img-size": 8, "model.in-chans": 1, "model.num-classes": 10, "model.patch-size": 4}
TINY |= {"model.width": 32, "model.depth": 1, "inversion.steps": 4, "inversion.batch-size": 10}
TINY |= {"inversion.stops": "0.3,0.6", "distill.rounds": 1, "distill.images-per-round": 10}
