"""Clients with folders of their own, through the Flower apps: the bits of the shares that lie in the folders."""

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from flwr.app import Error, Message, RecordDict
from local_grid import TINY, Federate, Sites, complaint, named
from tiny import contents

from deploy.demo_data import as_folders, as_parquet
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.runs.folder import RunFolder
from server_app import clients as meeting
from server_app.records import order

CLIENTS = 3
NAMES = ("hospital-a", "factory", "university")
DIGITS = tuple("0123456789")
SHARED = TINY | {"data.train-limit": 300, "partition.scheme": "dirichlet", "partition.clients": CLIENTS, "seed": 2}
OWN = SHARED | {"data.train-limit": 0, "partition.scheme": "own", "flower.clients": "|".join(NAMES)}


@pytest.fixture(scope="module")
def shares() -> list[Images]:
    """Of unequal sizes and with unequal classes."""
    return [client_images(Config.from_flat(SHARED), client)[0] for client in range(CLIENTS)]


@pytest.fixture(scope="module")
def folders(shares: list[Images], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sites")
    return [as_parquet(root / f"site {client}", images, DIGITS) for client, images in enumerate(shares)]


@pytest.fixture
def federate(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> Federate:
    """With these clients."""
    monkeypatch.setattr(meeting, "LOOK", 0.02)
    return partial(federate, **OWN)


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same experiment with shares of one data set, in one process."""
    out = str(tmp_path_factory.mktemp("dealt"))
    return pipeline.run(Config.from_flat(SHARED | {"out-dir": out}), "run")


@pytest.mark.parametrize("numbered", [False, True])
def test_own_folders_give_the_bits_of_the_shares_in_them(
    federate: Federate, folders: list[Path], dealt: RunFolder, numbered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Named in whatever order the nodes come; or numbered by hand.

    Whoever compares the line of names with the registrations sees if two nodes have exchanged their names.
    """
    nodes = named(NAMES, folders)
    for client, node in enumerate(nodes if numbered else ()):
        del node["client-name"]
        node |= {"partition-id": client, "num-partitions": CLIENTS}
    grid = Sites(nodes[::-1])
    run = federate(grid, **{"flower.clients": "" if numbered else " | ".join(NAMES)})
    taken = ", ".join(f"{name} by node {node}" for name, node in zip(NAMES, reversed(grid.get_node_ids()), strict=True))
    claimed = f"names are as the nodes claim them: {taken}; compare with the node IDs" in caplog.text
    assert claimed != numbered
    assert contents(run) == contents(dealt)
    result, simulated = run.read_result(), dealt.read_result()
    for key in ("accuracy", "evaluated_on", "clients", "bytes_up"):
        assert result[key] == simulated[key]
    assert result.get("client_names") == (None if numbered else list(NAMES))
    assert result["counts"] is None  # the clients did not tell
    assert run.config.data.class_names == DIGITS
    assert not run.partition_path.exists()


def test_one_class_one_site_and_many_sizes(federate: Federate, shares: list[Images], tmp_path: Path) -> None:
    """A client of a single class takes part like the others, all that holds them is an ImageFolder; and counts."""
    ones = shares[0].subset((shares[0].labels == 1).nonzero().flatten())
    sites = [ones, *shares[1:]]
    folders = [as_folders(tmp_path / str(number), images, DIGITS) for number, images in enumerate(sites)]
    run = federate(Sites(named(NAMES, folders)), **{"partition.min-size": 1, "upload.extras": "counts"})
    assert [upload.num_examples for upload in run.load_uploads()] == [len(images) for images in sites]
    assert run.read_result()["counts"] == [images.labels.bincount(minlength=10).tolist() for images in sites]
    assert run.partition_path.exists()
    assert len(ones) < min(len(shares[1]), len(shares[2]))


@pytest.mark.parametrize("strategy", ["oneshot", "fedavg"])
def test_the_clients_evaluate_without_any_image_at_the_server(
    federate: Federate, folders: list[Path], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmitr_flwr.data.own.open_split", lambda *_, **__: pytest.fail("the server read images"))
    grid = Sites([*named(NAMES, folders), {"client-name": "stranger"}])
    changes = {"evaluate.where": "clients", "evaluate.holdout": 0.2, "flower.strategy": strategy}
    run = federate(grid, **changes)
    assert grid.clients_asked("train") == grid.clients_asked("evaluate") == [0, 1, 2]
    result = run.read_result()
    held = sum(round(0.2 * pq.read_metadata(path / "train.parquet").num_rows) for path in folders)
    assert result["evaluated_on"]["where"] == "clients"
    assert abs(result["evaluated_on"]["images"] - held) <= CLIENTS  # each rounds
    assert 0 <= result["accuracy"]["student"] <= 100
    assert run.config.data.class_names == DIGITS


def test_a_named_client_keeps_its_number_when_the_run_is_resumed(
    federate: Federate, folders: list[Path], dealt: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its site comes back under another node id; the others may be in any state. What it had trained is not lost."""
    trained: list[int] = []
    train = pipeline.train_local
    monkeypatch.setattr(pipeline, "train_local", lambda *given: (trained.append(1), train(*given))[1])
    changes = {"flower.node-wait": 0.2, "flower.upload-timeout": 1.0}
    nodes = named(NAMES, folders)
    nodes[1]["data-path"] = str(folders[1] / "train.parquet")
    federate(Sites(nodes), fails="client factory: this client's data-path is no folder", **changes)
    grid = Sites(named(NAMES, folders))
    grid.tamper = lambda reply, client: [] if client == 1 else [reply]
    run = federate(grid, fails=r"missing: client 1 \(factory\); run with resume-from", **changes)
    again = Sites(named(("factory", "hospital-a"), (folders[1], Path("/unmounted"))))
    resumed = federate(again, **changes, **{"resume-from": str(run.path)})
    assert again.clients_asked("train") == [0]  # its node's place here, where it comes first
    assert len(trained) == CLIENTS
    assert resumed.path == run.path
    assert contents(resumed) == contents(dealt)


@pytest.mark.parametrize(
    ("change", "settings", "fails"),
    [
        ({}, {"flower.clients": ""}, "the nodes have names; .* here are now: 'factory | hospital-a | university'"),
        ({"client-name": "factory"}, {}, "client 'factory' is there twice .*its own client-name"),
        ({"client-name": None, "partition-id": 0, "num-partitions": 3}, {}, "client 0 .* has a number, but flower.cl"),
        ({"data-path": None}, {}, "client 'hospital-a' .* has no data-path, but partition.scheme = 'own'"),
        ({}, {"partition.scheme": "iid"}, "client .* has images of its own .* set partition.scheme = 'own'"),
        ({"data-path": "/nowhere/secret"}, {}, "cannot take part: client hospital-a: .* is no folder"),
        ({}, {"flower.clients": NAMES[0]}, "there is 1 client in all, and .* at least 2; add the names of the others"),
        ({"client-name": "stranger"}, {}, r"2 of 3 nodes .* missing: client 0 \(hospital-a\); start their SuperNodes"),
    ],
)
def test_contradictions_are_told_before_anybody_trains(
    federate: Federate,
    folders: list[Path],
    change: dict[str, Any],
    settings: dict[str, Any],
    fails: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = named(NAMES, folders)
    nodes[0] = {key: value for key, value in {**nodes[0], **change}.items() if value is not None}
    grid = Sites(nodes)
    federate(grid, fails=fails, **{"flower.node-wait": 0.2, **settings})
    assert grid.clients_asked("train") == []
    told = caplog.text.count("client 'stranger', which flower.clients does not name")
    assert told == (change == {"client-name": "stranger"})  # once


def spoilt(reply: Message, client: int) -> list[Message]:
    """Behind the clients come an app that does not load and another app than this one."""
    if client == CLIENTS:
        return [Message(Error(1, "no module named torch"), reply_to=reply)]
    if client == CLIENTS + 1:
        reply.content = RecordDict()
    return [reply]


def test_nodes_of_other_federations_may_be_in_any_state(
    federate: Federate, folders: list[Path], shares: list[Images], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Museums' nodes are at the same SuperLink, and cannot take part, for which nobody has asked them."""
    other = as_parquet(tmp_path / "museum", shares[0], tuple("abcdefghij"))
    states: list[dict[str, Any]] = [{}, {}]  # spoilt
    states += [{"data-path": str(path)} for path in (folders[0], "/nowhere", other)]
    states += [{"data-path": str(folders[0]), "max-epsilon": 8}]
    museums = [{"client-name": f"museum {number}", **state} for number, state in enumerate(states)]
    grid = Sites([*named(NAMES, folders), *museums])
    grid.cards = spoilt
    assert federate(grid).finished
    assert grid.clients_asked("train") == [0, 1, 2]
    for number in range(2, len(museums)):
        assert f"client 'museum {number}', which flower.clients does not name: it is not asked" in caplog.text


@pytest.mark.parametrize(("client", "told"), [(CLIENTS, "cannot take part"), (CLIENTS + 1, "does not say")])
def test_a_node_that_has_not_said_who_it_is_may_be_the_one_that_is_missing(
    federate: Federate, folders: list[Path], client: int, told: str
) -> None:
    grid = Sites([*named(NAMES, folders), {}, {}])
    grid.cards = spoilt
    del grid.contexts[grid.node(2)], grid.contexts[grid.node(7 - client)]
    fails = rf"missing: client 2 \(university\); start their SuperNodes; node {grid.node(client)} {told}"
    federate(grid, fails=fails, **{"flower.node-wait": 0.2})


def test_a_card_tells_of_trouble_what_an_error_would(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise DataError("in '/home/x rays/ann lee.png' it is cut short")

    monkeypatch.setattr("client_app.app.look_at_own", fail)
    grid = Sites(named(["factory"], folders[:1]))
    content = RecordDict({"config": order(Config.from_flat(OWN))})
    (reply,) = grid.send_and_receive([Message(content, grid.node(0), "query.describe")])
    assert reply.content["name"]["name"] == "factory"
    assert complaint(reply) == "client factory: in <path> it is cut short"
