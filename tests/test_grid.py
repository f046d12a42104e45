"""The observed grid and the meeting with the clients: bounded waits, names, a dead Ray actor, Flower's internals."""

import logging
import random
import time
from collections.abc import Iterable
from importlib import import_module
from itertools import chain, repeat
from typing import Any
from unittest.mock import DEFAULT, Mock

import httpx
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from local_grid import LocalGrid
from ray import ActorID
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError

from client_app.app import app as client_app
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.process import begin, forward
from fedmitr_flwr.config import Config, FlowerConfig
from fedmitr_flwr.config.limits import needed
from server_app import clients as meeting
from server_app.clients import meet
from server_app.grid import _DEAD_ACTOR, ObservedGrid


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LOOK", 0.02)


def quick(**changes: Any) -> Config:
    return Config(flower=FlowerConfig(**{"node_wait": 0.2, **changes}))


def questions(grid: LocalGrid) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


def observed(inner: LocalGrid, on_reply: Any = None, **more: Any) -> ObservedGrid:
    clients = {node: client for client, node in enumerate(inner.get_node_ids())}
    return ObservedGrid(inner, on_reply, **{"clients": clients, "poll": 0.01, **more})


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, _: Any) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message)

    return app


class RayPool(LocalGrid):
    """What Flower's simulation does: actors in a stack, and one that died goes back into it and fails at once.

    Whenever all replies have been asked for once, every actor at work ends what it does. `killed` is the client during
    which an actor dies.
    """

    def __init__(self, count: int, actors: int, killed: int, late: int | None = None) -> None:
        super().__init__(echo(), count)
        self.killed, self.late = killed, late  # `late`: the client whose reply is there one look later than it would be
        self.idle, self.busy, self.queue = [f"{number:02x}" for number in range(actors)], [], []
        self.dead: set[str] = set()
        self.ready: dict[str, Message] = {}  # message id -> the reply to it, which waits to be fetched
        self.waiting: dict[str, None] = {}  # message ids without a fetched reply, in the order of asking

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        sent = super().push_messages(asked)
        self.queue += zip(sent, asked, strict=True)
        self.waiting |= dict.fromkeys(sent)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (asked,) = message_ids
        if asked == next(iter(self.waiting)):
            self._work()
        if asked not in self.ready:
            return []
        if self.client(self.ready[asked].metadata.src_node_id) == self.late:
            self.late = None
            return []
        del self.waiting[asked]
        return [self.ready.pop(asked)]

    def _work(self) -> None:
        done, self.busy = self.busy, []
        for work in done:
            self._end(*work)
        while self.queue and self.idle:
            work = self.idle.pop(), *self.queue.pop(0)
            if work[0] in self.dead:
                self._end(*work)
            else:
                self.busy.append(work)

    def _end(self, actor: str, sent: str, message: Message) -> None:
        self.idle.append(actor)
        (self.ready[sent],) = super().pull_messages([sent])
        if self.client(message.metadata.dst_node_id) == self.killed:
            self.dead.add(actor)
        if actor in self.dead:
            text = f"<class 'ray.exceptions.ActorDiedError'>:<'The actor died.\n\tactor_id: {actor}\n'>"
            self.ready[sent] = Message(Error(0, text), reply_to=message)


@pytest.mark.parametrize(("killed", "late"), [(0, None), (2, None), (5, None), (0, 0)])
def test_a_dead_ray_actor_costs_one_client_and_not_the_queue_behind_it(killed: int, late: int | None) -> None:
    """Who killed the actor is known, though another's failure may be fetched first."""
    pool = RayPool(6, actors=2, killed=killed, late=late)
    replies = observed(pool, poll=0).send_and_receive(questions(pool), timeout=10)
    assert [pool.client(reply.metadata.src_node_id) for reply in replies if reply.has_error()] == [killed]
    assert len(replies) == 6
    assert pool.clients_asked("train").count(killed) == 1


def test_without_a_living_actor_the_asking_ends() -> None:
    pool = RayPool(5, actors=1, killed=0)
    replies = observed(pool, poll=0).send_and_receive(questions(pool), timeout=10)
    assert [reply.has_error() for reply in replies] == [True] * 5
    assert len(pool.asked) == 1 + 4 * 3


def test_replies_come_back_in_the_clients_order() -> None:
    seen: list[tuple[int, int]] = []
    local = LocalGrid(echo(), 5, rng=random.Random(0))
    clients = {local.node(i): 4 - i for i in range(5)}
    grid = observed(local, lambda reply, node: seen.append((reply.metadata.src_node_id, node)), clients=clients)
    replies = grid.send_and_receive(questions(local))
    assert [grid.clients[reply.metadata.src_node_id] for reply in replies] == [0, 1, 2, 3, 4]
    assert sorted(seen) == [(local.node(i), local.node(i)) for i in range(5)] != seen


def test_one_reply_is_in_memory_at_a_time_and_the_time_in_the_hook_does_not_count() -> None:
    """Four models of 344 MB at once would be too much for a server; the hook frees each before the next is fetched."""
    fetched: list[int | None] = []

    class Counting(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            fetched.append(len(replies))
            return replies

    local = Counting(echo(), 4)
    grid = observed(local, lambda *_: fetched.append(time.sleep(0.15)))
    assert len(grid.send_and_receive(questions(local), timeout=0.1)) == 4
    assert fetched == [1, None] * 4  # None: the hook has slept


def test_late_replies_are_named_and_do_not_count_for_the_quorum(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return [sent for sent in super().push_messages(messages) if self.asked[-1][1] != 1]

    local = Picky(echo(), 5, tamper=lambda reply, client: [reply] if client else [])
    assert len(observed(local, quorum=0.6).send_and_receive(questions(local), timeout=0.1)) == 3
    assert "client 1 cannot be asked" in caplog.text
    assert "client 0 did not reply in time" in caplog.text
    assert "client 1 did not" not in caplog.text
    with pytest.raises(RunError, match=r"3 of 5 clients .* flower.quorum = 0.8"):
        observed(local, quorum=0.8).send_and_receive(questions(local), timeout=0.1)


def test_a_quorum_is_not_raised_by_floating_point() -> None:
    """0.56 * 25 is 14.000000000000002 in binary, 0.07 * 100 is 7.000000000000001."""
    fewest = {(0.56, 25): 14, (0.28, 50): 14, (0.07, 100): 7, (0.01, 3): 1, (0.01, 4): 1, (0.5, 4): 2, (0.5, 5): 3}
    fewest |= {(0.51, 4): 3, (0.75, 4): 3, (1.0, 4): 4, (1.0, 7): 7}
    assert {of: needed(*of) for of in fewest} == fewest


def test_meeting_maps_random_nodes_to_clients() -> None:
    grid = LocalGrid(client_app, 3)
    grid.contexts = dict(reversed(grid.contexts.items()))
    clients = meet(grid, quick())
    assert clients.number == 3
    assert list(clients.nodes.items()) == [(client, grid.node(client)) for client in range(3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition-id": 0}, "client 0 is there twice"),
        ({"partition-id": 3}, "partition-id = 3; use one from 0 to 2"),
        ({"partition-id": -1}, "partition-id = -1"),
        ({"num-partitions": 4}, "one of 4 clients, others or the run folder say 3"),
        ({"partition-id": None}, "the node has no partition-id; start the SuperNode with --node-config"),
        ({"num-partitions": None}, "the node has no num-partitions"),
    ],
)
def test_nodes_that_contradict_each_other_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    grid = LocalGrid(client_app, 3)
    node = grid.contexts[grid.node(2)].node_config | changes
    grid.contexts[grid.node(2)].node_config = {key: value for key, value in node.items() if value is not None}
    with pytest.raises(RunError, match=message):
        meet(grid, quick())


def absent(grid: LocalGrid, *clients: int) -> LocalGrid:
    for client in clients:
        del grid.contexts[grid.node(client)]
    return grid


def test_waiting_for_nodes_has_an_end_and_names_what_is_wrong() -> None:
    """One that is silent is told from one that is absent; what waiting cannot mend is told at once."""
    unsigned = Error(7, "The FAB could not be verified.")
    mute = LocalGrid(client_app, 2, cards=lambda reply, client: [] if client else [reply])
    strict = LocalGrid(client_app, 2, cards=lambda reply, _: [Message(unsigned, reply_to=reply)])
    for grid, wait, told in (
        (
            absent(LocalGrid(client_app, 5), 1, 3),
            0.2,
            "3 of 5 nodes after .* missing: clients 1, 3; .*num-supernodes=5",
        ),
        (absent(LocalGrid(client_app, 2), 0, 1), 0.2, "0 of 2 nodes after"),
        (mute, 0.2, "1 nodes are there but did not say .*raise flower.node-wait"),
        (strict, 600.0, r"cannot take part: The FAB .* signed apps only .* see deploy/README\.md"),
        (LocalGrid(client_app, 1), 600.0, "there is 1 client in all, and a federation .* 2; .*num-supernodes=2"),
    ):
        with pytest.raises(RunError, match=told):
            meet(grid, quick(node_wait=wait))


@pytest.mark.parametrize("code", [None, 0, 5, 8])  # silent; Ray's, node unavailable, ClientApp crashed
def test_a_node_that_was_lost_or_stays_silent_is_asked_again(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """Node 1 is being started again when it is asked who it is; without a code, nobody misses it meanwhile."""

    def lost_once(reply: Message, client: int) -> list[Message]:
        if not client or grid.asked.count(("query.describe", client)) > 1:
            return [reply]
        return [] if code is None else [Message(Error(code, "lost"), reply_to=reply)]

    monkeypatch.setattr(meeting, "LOST", 0.1)
    monkeypatch.setattr(meeting, "SILENT", 0.2)
    grid = LocalGrid(client_app, 2, cards=lost_once)
    assert meet(grid, quick(node_wait=60.0)).number == 2
    assert grid.clients_asked("query.describe") == [0, 1, 1]


def test_newcomers_are_asked_while_a_slow_node_is_waited_for_and_its_answer_counts() -> None:
    """Node 0 says who it is only after node 2 has, which comes later than the others."""

    class Slow(LocalGrid):
        looks = 0

        def get_node_ids(self) -> list[int]:
            self.looks += 1
            return super().get_node_ids()[: 2 if self.looks < 3 else 3]

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            ready = self.clients_asked("query.describe") == [0, 1, 2]
            of_0 = [sent for sent, (reply,) in self._arrived.items() if reply.metadata.src_node_id == self.node(0)]
            return super().pull_messages(sent for sent in message_ids if ready or sent not in of_0)

    grid = Slow(client_app, 3)
    assert meet(grid, quick(node_wait=60.0)).number == 3
    assert grid.clients_asked("query.describe") == [0, 1, 2]


def test_a_quorum_goes_on_without_the_missing_node(caplog: pytest.LogCaptureFixture) -> None:
    clients = meet(absent(LocalGrid(client_app, 5), 1), quick(quorum=0.8))
    assert sorted(clients.nodes) == [0, 2, 3, 4]
    assert "4 of 5 clients" in caplog.text
    clients = meet(absent(LocalGrid(client_app, 3), 0), quick(node_wait=60.0), known=3, uploaded=[0])
    assert sorted(clients.nodes) == [1, 2]


def test_everything_else_is_the_inner_grids() -> None:
    local, run = LocalGrid(echo(), 2), object()
    grid = ObservedGrid(local)
    grid.set_run(run)
    assert grid.run is run
    assert [info.node_id for info in grid.get_nodes()] == list(grid.get_node_ids()) == local.get_node_ids()
    with pytest.raises(RuntimeError, match="deprecated in Flower"):
        grid.create_message(RecordDict(), "train", 1, "")


def stumbling(count: int, status: int, path: str, times: int) -> LocalGrid:
    """Around a SuperLink that answers so many looks for replies with an error."""
    request = httpx.Request("POST", f"https://127.0.0.1:8443/v1/runtime/{path}")
    error = httpx.HTTPStatusError("no\nmore", request=request, response=httpx.Response(status))
    inner = LocalGrid(echo(), count)
    answers = chain(repeat(error, times), repeat(DEFAULT))
    inner.pull_messages = Mock(wraps=inner.pull_messages, side_effect=answers)
    return inner


def test_a_superlink_that_stumbles_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    inner = stumbling(3, 500, "pull-messages", times=5)
    replies = observed(inner).send_and_receive(questions(inner))
    assert [inner.client(reply.metadata.src_node_id) for reply in replies] == [0, 1, 2]
    assert caplog.text.count("it is asked again (no)") == 5


@pytest.mark.parametrize(
    ("status", "path", "again"),
    [(500, "pull-object", False), (403, "pull-messages", False), (503, "pull-messages", True)],
)
def test_other_errors_end_the_run(monkeypatch: pytest.MonkeyPatch, status: int, path: str, again: bool) -> None:
    monkeypatch.setattr("server_app.grid.STUMBLE", 0.1)
    inner = stumbling(1, status, path, times=10**9)
    with pytest.raises(httpx.HTTPStatusError):
        observed(inner).send_and_receive(questions(inner))
    assert (inner.pull_messages.call_count > 2) == again


# --- Flower's and Ray's internals: each test is named after what breaks when they change


def test_the_grid_of_a_deployment_is_called_http_grid() -> None:
    """`ObservedGrid.sends_copies` tells it from a simulation's, whose messages are the very objects that were sent."""
    assert import_module("flwr.superlink.runtime.run_serverapp").HttpGrid is HttpGrid
    assert ObservedGrid(object.__new__(HttpGrid)).sends_copies
    assert not ObservedGrid(object.__new__(InMemoryGrid)).sends_copies


def test_ray_names_the_dead_actor_in_the_error_that_flower_passes_on() -> None:
    actor = "ab" * ActorID.size()
    died = ActorDiedError(ActorDiedErrorContext(actor_id=bytes.fromhex(actor), error_message="killed"))
    found = _DEAD_ACTOR.search(f"{type(died)}:<'{died}'>")
    assert found is not None
    assert found[1] == actor


def test_what_the_core_logs_appears_once_where_flower_s_log_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "handlers", [*flower.handlers, caplog.handler])
    for name in ("flwr", "fedmitr"):
        caplog.set_level(logging.INFO, name)
    begin(flower)
    forward("fedmitr", flower)
    logging.getLogger("fedmitr.any").info("a\x1b[31mb\n\tc %s", "\u202ed")
    logging.getLogger("fedmitr.any").debug("not shown")
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == [
        "fedmitr: a\\x1b[31mb",
        "fedmitr: \tc \\u202ed",
    ]


def test_a_client_s_text_reaches_flower_s_log_without_control_characters() -> None:
    """Flower's strategies log the text of an error reply as it is."""

    def broken(reply: Message, client: int) -> list[Message]:
        text = f"ConfigError\x1b]0;owned\x07\nERROR : client {client} is trusted\u202e"
        return [Message(Error(2, text), reply_to=reply)]

    grid = ObservedGrid(LocalGrid(client_app, 1, tamper=broken))
    (reply,) = grid.send_and_receive([Message(RecordDict(), next(iter(grid.get_node_ids())), "train")])
    assert reply.error.reason == r"ConfigError\x1b]0;owned\x07\nERROR : client 0 is trusted\u202e"
