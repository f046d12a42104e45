"""Who is who: node ids are random in every run, the clients' numbers are not. Waiting for nodes has a limit."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from logging import getLogger

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmitr_flwr.config import FlowerConfig
from fedmitr_flwr.errors import RunError
from fedmitr_flwr.fingerprint import fingerprint

from .grid import ObservedGrid, reason

log = getLogger("flwr")

_WRONG_SET_UP = (1, 2)  # Flower's codes: the ClientApp could not be loaded; it raised

_START_MORE = (
    "start more SuperNodes (each with its own partition-id) or, in simulation, run: "
    "flwr run . --federation-config 'num-supernodes={}'"
)


@dataclass(frozen=True)
class Clients:
    """The clients that answered: client -> node, and their number K in the whole partition."""

    nodes: dict[int, int]
    number: int


@dataclass(frozen=True)
class _Card:
    """What one node says about itself."""

    client: int
    clients: int
    fingerprint: int


def meet(grid: Grid, flower: FlowerConfig, known: int = 0, uploaded: Collection[int] = ()) -> Clients:
    """Wait until every client whose upload is needed has a node.

    Args:
        grid: Flower's grid.
        flower: the limits: min-nodes, node-wait, quorum.
        known: K where it is known already (a run that is continued); 0: the nodes announce it.
        uploaded: clients that need not be there.

    Raises:
        RunError: nodes are missing after `node-wait` seconds, contradict each other, or run other code.
    """
    deadline = time.monotonic() + flower.node_wait
    cards: dict[int, _Card] = {}
    silent: set[int] = set()
    while True:
        strangers = [node for node in grid.get_node_ids() if node not in cards and node not in silent]
        cards |= _describe(grid, strangers, max(1.0, deadline - time.monotonic()))
        silent |= set(strangers) - set(cards)
        clients = _roster(cards, known)
        late = time.monotonic() >= deadline
        if _complete(clients, flower, uploaded, late):
            return clients
        if late:
            raise RunError(_too_few(clients, flower, uploaded, len(silent)))
        time.sleep(0.5)


def _describe(grid: Grid, nodes: Iterable[int], timeout: float) -> dict[int, _Card]:
    observed = ObservedGrid(grid, poll=0.1)
    questions = [Message(RecordDict(), node, "query.describe", ttl=timeout + 60) for node in nodes]
    cards = {}
    for reply in observed.send_and_receive(questions, timeout=timeout) if questions else []:
        node = observed.node_of(reply)
        if reply.has_error():
            if reply.error.code in _WRONG_SET_UP:
                raise RunError(f"node {node} does not say which client it is: {reason(reply)}")
            continue  # lost, and perhaps replaced in time
        told = reply.content["card"]
        cards[node] = _Card(*(int(told[key]) for key in ("partition-id", "num-partitions", "fingerprint")))  # type: ignore[arg-type]
    return cards


def _roster(cards: dict[int, _Card], known: int) -> Clients:
    """Put the cards together, and refuse those that contradict each other."""
    own = int(fingerprint(), 16)
    number = known
    nodes: dict[int, int] = {}
    for node, card in sorted(cards.items()):
        number = number or card.clients
        if card.clients != number:
            raise RunError(
                f"client {card.client} (node {node}) is one of {card.clients} clients, others or the run folder say "
                f"{number}; give all SuperNodes the same num-partitions"
            )
        if not 0 <= card.client < number:
            raise RunError(f"node {node} has partition-id = {card.client}; use one from 0 to {number - 1}")
        if card.client in nodes:
            raise RunError(
                f"client {card.client} is there twice (nodes {nodes[card.client]} and {node}); "
                "give every SuperNode its own partition-id"
            )
        if card.fingerprint != own:
            raise RunError(
                f"client {card.client} (node {node}) runs other code ({card.fingerprint:012x}) than the server "
                f"({own:012x}); restart the SuperLink and its SuperNodes from this checkout, and do not edit the code "
                "while a run starts"
            )
        nodes[card.client] = node
    return Clients(dict(sorted(nodes.items())), number)


def _complete(clients: Clients, flower: FlowerConfig, uploaded: Collection[int], late: bool) -> bool:
    here = set(clients.nodes) | set(uploaded)
    if not clients.number:
        return False
    if clients.number < flower.min_nodes:
        raise RunError(
            f"there are {clients.number} clients in all, flower.min-nodes = {flower.min_nodes}; "
            f"{_START_MORE.format(flower.min_nodes)}"
        )
    if len(here) == clients.number:
        return True
    enough = clients.nodes and len(here) >= flower.quorum * clients.number
    if late and enough:
        log.warning("going on with %d of %d clients, as flower.quorum allows", len(here), clients.number)
    return bool(late and enough)


def _too_few(clients: Clients, flower: FlowerConfig, uploaded: Collection[int], silent: int) -> str:
    wanted = max(flower.min_nodes, clients.number)
    missing = sorted(set(range(wanted)) - set(clients.nodes) - set(uploaded))
    if silent:
        return (
            f"{silent} nodes are there but did not say which client they are in flower.node-wait = "
            f"{flower.node_wait:.0f} s; see the log above, or raise flower.node-wait"
        )
    return (
        f"{len(clients.nodes)} of {wanted} nodes after flower.node-wait = {flower.node_wait:.0f} s, missing: "
        f"client{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}; {_START_MORE.format(wanted)}"
    )
