"""Who is who: node ids are random in every run, the clients' numbers and names are not. Waiting has a limit."""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import flwr
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.common.releases import FLWR, too_old
from fedmitr_flwr.config import Config, FlowerConfig
from fedmitr_flwr.config.limits import SEPARATOR, needed
from fedmitr_flwr.config.sections import OWN

from .grid import ObservedGrid, first_line, reason
from .records import order

log = getLogger("fedmitr")

_LONGEST_NAME = 64  # it comes from outside, and is printed
_NOT_LOADED, _RAISED, _UNSIGNED = 1, 2, 7  # Flower's codes of what the ClientApp did, or was not let do
_SAME_CODE = "restart the SuperLink and its SuperNodes from this checkout"
_HINTS = {
    _NOT_LOADED: f"; its SuperNode's log says why: does it have torch, timm and flwr >= {FLWR}?",
    _RAISED: "",
    _UNSIGNED: "; it accepts signed apps only (--trusted-entities), see deploy/README.md",
}

_START_MORE = (
    "start more SuperNodes (each with its own partition-id) or, in simulation, run: "
    "flwr run . --federation-config 'num-supernodes={}'"
)
_NAME_MORE = "add the names of the others to flower.clients"
FEWEST = 2  # clients of a federation

LOOK = 0.5  # seconds between two looks for nodes and answers
# Seconds until a node is asked again: one that was lost, one that failed, and one whose question was lost perhaps.
LOST, FAILED, SILENT = 5.0, 30.0, 120.0


@dataclass(frozen=True)
class Clients:
    """The clients that answered: client -> node, and their number K in the whole partition."""

    nodes: dict[int, int]
    number: int


@dataclass(frozen=True)
class _Card:
    """What one node says about itself."""

    client: int  # -1: it has a name, or does not know
    clients: int  # 0: it has a name, or does not know
    name: str
    own_data: bool
    fingerprint: int
    flwr: str  # the version that it runs
    trouble: str = ""  # why it cannot take part

    def __str__(self) -> str:
        return f"client {self.name!r}" if self.name else f"client {self.client}"

    def number(self, names: Sequence[str]) -> int:
        """Which client this is; -1: none of the names', or none at all."""
        if not self.name:
            return self.client
        return names.index(self.name) if self.name in names else -1


def meet(grid: Grid, config: Config, known: int = 0, uploaded: Collection[int] = ()) -> Clients:
    """Wait until every client whose upload is needed has a node.

    Nodes that `flower.clients` does not name, and those of clients that have `uploaded`, may be in any state. `known`
    is K where it is known already (a run that is continued); 0: the nodes announce it.

    Raises:
        RunError: nodes are missing after `node-wait` seconds, contradict each other, run other code, or have images
            that cannot be used.
    """
    flower = config.flower
    deadline = time.monotonic() + flower.node_wait
    asking = _Asking(grid, config, uploaded)
    while True:
        asking.ask(max(1.0, deadline - time.monotonic()))
        asking.listen()
        clients = _roster(asking.cards, config, known, uploaded)
        late = time.monotonic() >= deadline
        if _complete(clients, flower, uploaded, late):
            if names := flower.client_names:
                # Flower shows the server a node's number, which belongs to its key, and not the key.
                taken = ", ".join(f"{names[client]} by node {node}" for client, node in clients.nodes.items())
                compare = "compare with the node IDs of your registrations (deploy/README.md)"
                log.info("names are as the nodes claim them: %s; %s", taken, compare)
            return clients
        if late:
            raise RunError(_too_few(clients, flower, uploaded, asking.silent()) + asking.problem())
        time.sleep(LOOK)


def with_number_of(clients: Clients, config: Config) -> Config:
    """The settings with the number of clients that there are, which is said where another one was wanted."""
    wanted = config.partition.clients
    if wanted != clients.number:
        log.warning(
            "partition.clients = %d has no effect here: there are %d clients, one for each node", wanted, clients.number
        )
    return config.with_clients(clients.number)


class _Asking:
    """Asks every node who it is, once it is there; answers count whenever they come."""

    def __init__(self, grid: Grid, config: Config, uploaded: Collection[int]) -> None:
        self.cards: dict[int, _Card] = {}
        self._grid, self._config, self._uploaded = ObservedGrid(grid), config, uploaded
        self._content = RecordDict({"config": order(config)})
        self._waiting: dict[str, int] = {}  # message id -> node
        self._next: dict[int, float] = {}  # node -> when it is asked again
        self._problems: dict[int, str] = {}
        self._here: set[int] = set()

    def ask(self, seconds: float) -> None:
        """Ask the nodes that are new, and again those whose time has come; the questions hold for `seconds`."""
        self._here = set(self._grid.get_node_ids())
        for node in sorted(self._here - set(self.cards)):
            if time.monotonic() >= self._next.get(node, -math.inf):
                sent = self._grid.push_messages([Message(self._content, node, "query.describe", ttl=seconds + 60)])
                self._waiting |= dict.fromkeys(sent, node)
                self._put_off(node, SILENT if sent else LOST)

    def listen(self) -> None:
        """Take the answers that are there.

        Raises:
            RunError: a node cannot say who it is, and every node is needed.
        """
        for reply in self._grid.pull_messages(list(self._waiting)):
            node = self._waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None and node not in self.cards:
                self._take(reply, node)

    def silent(self) -> int:
        """How many nodes are there and have said nothing."""
        return len(self._here - set(self.cards) - set(self._problems))

    def problem(self) -> str:
        """The end of a line: why a node that is there cannot say who it is, if there is one."""
        unknown = self._here - set(self.cards)
        return next((f"; {problem}" for node, problem in self._problems.items() if node in unknown), "")

    def _take(self, reply: Message, node: int) -> None:
        if reply.has_error():
            if reply.error.code in _HINTS:
                self._fail(node, f"node {node} cannot take part: {reason(reply)}{_HINTS[reply.error.code]}")
            else:  # a node that is started again keeps its id
                self._put_off(node, LOST)
            return
        try:
            card = _read_card(reply)
        except (KeyError, TypeError, ValueError, OverflowError):
            self._fail(node, f"node {node} does not say who it is as this app does; {_SAME_CODE}")
            return
        self.cards[node] = card
        names = self._config.flower.client_names
        if names and card.name and card.name not in names:
            log.warning("node %d is %s, which flower.clients does not name: it is not asked", node, card)
        elif card.number(names) in self._uploaded:
            log.info("node %d is %s, whose upload is there: it is not asked", node, card)

    def _fail(self, node: int, problem: str) -> None:
        """It may be a node that is not needed, unless all are: then waiting would be in vain."""
        if not self._config.flower.client_names and not self._uploaded:
            raise RunError(problem)
        if self._problems.get(node) != problem:
            log.warning("%s; the others are waited for, and it is asked again", problem)
        self._problems[node] = problem
        self._put_off(node, FAILED)

    def _put_off(self, node: int, seconds: float) -> None:
        self._next[node] = time.monotonic() + seconds


def _read_card(reply: Message) -> _Card:
    card: Any = reply.content["card"]
    names: Any = reply.content["name"]
    return _Card(
        client=int(card.get("partition-id", -1)),
        clients=int(card.get("num-partitions", 0)),
        name=str(names["name"])[:_LONGEST_NAME],
        own_data=bool(card["own-data"]),
        fingerprint=int(card["fingerprint"]),
        flwr=str(names.get("flwr", ""))[:_LONGEST_NAME],
        trouble=first_line(names["trouble"]) if "trouble" in names else "",
    )


def _roster(cards: dict[int, _Card], config: Config, known: int, uploaded: Collection[int]) -> Clients:
    """Put the cards of those that are needed together, and refuse those that contradict each other."""
    names = config.flower.client_names
    number = known or len(names)
    nodes: dict[int, int] = {}
    for node, card in sorted(cards.items()):
        client = card.number(names)
        if client in uploaded or (names and card.name and client < 0):
            continue
        if card.trouble:
            raise RunError(f"node {node} cannot take part: {card.trouble}")
        _require_same_code(node, card)
        _require_same_naming(cards, node, card, names)
        _require_images(node, card, config)
        number = number or card.clients
        if not names and card.clients != number:
            raise RunError(
                f"client {card.client} (node {node}) is one of {card.clients} clients, others or the run folder say "
                f"{number}; give all SuperNodes the same num-partitions"
            )
        if not 0 <= client < number:
            raise RunError(f"node {node} has partition-id = {client}; use one from 0 to {number - 1}")
        if client in nodes:
            raise RunError(
                f"{card} is there twice (nodes {nodes[client]} and {node}); "
                f"give every SuperNode its own {'client-name' if names else 'partition-id'}"
            )
        nodes[client] = node
    return Clients(dict(sorted(nodes.items())), number)


def _require_same_code(node: int, card: _Card) -> None:
    """Of this app to the letter; of Flower a release as new as the server's, but for the last number."""
    if problem := too_old(card.flwr, flwr.__version__):
        raise RunError(f"{card} (node {node}): {problem}")
    own = int(core(), 16)
    if card.fingerprint != own:
        raise RunError(
            f"{card} (node {node}) runs other code ({card.fingerprint:012x}) than the server "
            f"({own:012x}); {_SAME_CODE}, and do not edit the code while a run starts"
        )


def _require_same_naming(cards: dict[int, _Card], node: int, card: _Card, names: Collection[str]) -> None:
    """All have names and the config lists them, or all have numbers."""
    if card.name and not names:
        found = f" {SEPARATOR} ".join(sorted({each.name for each in cards.values() if each.name}))
        raise RunError(f"the nodes have names; set flower.clients to those of all clients; here are now: {found!r}")
    if names and not card.name:
        raise RunError(
            f"{card} (node {node}) has a number, but flower.clients names the clients; start its SuperNode with "
            "a client-name, or leave flower.clients empty"
        )


def _require_images(node: int, card: _Card, config: Config) -> None:
    """Images are everybody's own, or everybody's share of one data set."""
    if config.partition.scheme == OWN and not card.own_data:
        raise RunError(
            f"{card} (node {node}) has no data-path, but partition.scheme = 'own'; start its SuperNode with "
            """--node-config 'data-path="/path/of/its/images"'"""
        )
    if config.partition.scheme != OWN and card.own_data:
        raise RunError(
            f"{card} (node {node}) has images of its own (data-path), but partition.scheme = "
            f"{config.partition.scheme!r} deals out shares of one data set; set partition.scheme = 'own'"
        )


def _complete(clients: Clients, flower: FlowerConfig, uploaded: Collection[int], late: bool) -> bool:
    here = set(clients.nodes) | set(uploaded)
    if not clients.number:
        return False
    if clients.number < FEWEST:
        raise RunError(
            f"there is {clients.number} client in all, and a federation has at least {FEWEST}; "
            f"{_NAME_MORE if flower.client_names else _START_MORE.format(FEWEST)}"
        )
    if len(here) == clients.number:
        return True
    enough = len(here) >= needed(flower.quorum, clients.number)
    if late and enough:
        log.warning("going on with %d of %d clients, as flower.quorum allows", len(here), clients.number)
    return late and enough


def _too_few(clients: Clients, flower: FlowerConfig, uploaded: Collection[int], silent: int) -> str:
    wanted = max(FEWEST, clients.number)
    missing = sorted(set(range(wanted)) - set(clients.nodes) - set(uploaded))
    if silent:
        return (
            f"{silent} nodes are there but did not say which client they are in flower.node-wait = "
            f"{flower.node_wait:.0f} s; see the log above, or raise flower.node-wait"
        )
    fix = "start their SuperNodes" if flower.client_names else _START_MORE.format(wanted)
    here = f"{len(clients.nodes)} of {wanted - len(uploaded)} nodes"
    return (
        f"{here} after flower.node-wait = {flower.node_wait:.0f} s, missing: "
        f"client{'s' * (len(missing) > 1)} {flower.labels(missing)}; {fix}"
    )
