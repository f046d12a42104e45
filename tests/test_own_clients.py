"""Clients with folders of their own, through the Flower apps: the bits of the shares that lie in the folders."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from local_grid import TINY, Federate, Sites, complaint, named
from tiny import timeless

from deploy.demo_data import as_folders, as_parquet
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import DataError, UserError
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.runs.folder import RunFolder
from server_app import clients as meeting
from server_app.records import order

CLIENTS = 3
NAMES = ("hospital-a", "factory", "university")
DIGITS = tuple("0123456789")
SHARED = TINY | {"data.train-limit": 0, "partition.scheme": "dirichlet", "partition.clients": CLIENTS, "seed": 2}
OWN = SHARED | {"partition.scheme": "own", "flower.clients": "|".join(NAMES)}


@pytest.fixture(scope="module")
def shares() -> list[Images]:
    """Of unequal sizes and with unequal classes."""
    return [client_images(Config.from_flat(SHARED), client)[0] for client in range(CLIENTS)]


@pytest.fixture(scope="module")
def folders(shares: list[Images], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sites")
    return [as_parquet(root / f"site {client}", images, DIGITS) for client, images in enumerate(shares)]


@pytest.fixture
def federate(federate: Federate) -> Federate:
    """With these clients."""
    return partial(federate, **OWN)


def contents(folder: RunFolder) -> list[bytes]:
    return [timeless(path) for path in [*folder.upload_paths().values(), folder.model_path]]


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
    if numbered:
        nodes = [
            {"partition-id": client, "num-partitions": CLIENTS, "data-path": str(path)}
            for client, path in enumerate(folders)
        ]
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


def test_class_counts_are_told_by_choice(federate: Federate, folders: list[Path], dealt: RunFolder) -> None:
    run = federate(Sites(named(NAMES, folders)), **{"upload.extras": "counts"})
    assert run.read_result()["counts"] == dealt.read_result()["counts"]
    assert run.partition_path.exists()


def test_one_class_one_site_and_many_sizes(federate: Federate, shares: list[Images], tmp_path: Path) -> None:
    """A client of a single class takes part like the others, and all that holds them is an ImageFolder."""
    ones = shares[0].subset((shares[0].labels == 1).nonzero().flatten())
    sites = [ones, *shares[1:]]
    folders = [as_folders(tmp_path / str(number), images, DIGITS) for number, images in enumerate(sites)]
    run = federate(Sites(named(NAMES, folders)), **{"partition.min-size": 1})
    assert [upload.num_examples for upload in run.load_uploads()] == [len(images) for images in sites]
    assert len(ones) < min(len(shares[1]), len(shares[2]))


def test_the_clients_evaluate_without_any_image_at_the_server(
    federate: Federate, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmitr_flwr.data.own.open_split", lambda *_, **__: pytest.fail("the server read images"))
    run = federate(Sites(named(NAMES, folders)), **{"evaluate.where": "clients", "evaluate.holdout": 0.2})
    result = run.read_result()
    held = sum(round(0.2 * (upload.num_examples / 0.8)) for upload in run.load_uploads())
    assert result["evaluated_on"]["where"] == "clients"
    assert abs(result["evaluated_on"]["images"] - held) <= CLIENTS  # each rounds
    assert 0 <= result["accuracy"]["student"] <= 100


def test_a_named_client_keeps_its_number_when_the_run_is_resumed(
    federate: Federate, folders: list[Path], dealt: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its site comes back under another node id, and the others need not come. What it had trained is not lost."""
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
    again = Sites([named(NAMES, folders)[1]])
    resumed = federate(again, **changes, **{"resume-from": str(run.path)})
    assert again.clients_asked("train") == [0]  # its node's place here, where it is alone
    assert len(trained) == CLIENTS
    assert resumed.path == run.path
    assert contents(resumed) == contents(dealt)


def test_a_strategy_of_flower_s_own_works_on_own_folders(federate: Federate, folders: list[Path]) -> None:
    grid = Sites([*named(NAMES, folders), {"client-name": "stranger"}])
    run = federate(grid, **{"flower.strategy": "fedavg"})
    assert grid.clients_asked("train") == [0, 1, 2]
    assert 0 <= run.read_result()["accuracy"]["student"] <= 100
    assert run.config.data.class_names == DIGITS


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
    federate: Federate, folders: list[Path], change: dict[str, Any], settings: dict[str, Any], fails: str
) -> None:
    nodes = named(NAMES, folders)
    nodes[0] = {key: value for key, value in {**nodes[0], **change}.items() if value is not None}
    grid = Sites(nodes)
    changes = {"flower.node-wait": 0.2, **settings}
    federate(grid, fails=fails, **changes)
    assert grid.clients_asked("train") == []


@pytest.mark.parametrize("trouble", ["none", "no folder", "other classes", "privacy", "does not load", "another app"])
def test_nodes_of_other_federations_may_be_in_any_state(
    federate: Federate,
    folders: list[Path],
    shares: list[Images],
    tmp_path: Path,
    trouble: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A museum's node is at the same SuperLink, and cannot take part, for which nobody has asked it."""
    other = as_parquet(tmp_path / "museum", shares[0], tuple("abcdefghij"))
    told: dict[str, dict[str, Any]] = {
        "none": {"data-path": str(folders[0])},
        "no folder": {"data-path": "/nowhere"},
        "other classes": {"data-path": str(other)},
        "privacy": {"data-path": str(folders[0]), "max-epsilon": 8},
    }

    class Museum(Sites):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [self.spoilt(reply) for reply in super().pull_messages(message_ids)]

        def spoilt(self, reply: Message) -> Message:
            if reply.metadata.src_node_id == self.node(CLIENTS) and trouble == "another app":
                reply.content = RecordDict()
            elif reply.metadata.src_node_id == self.node(CLIENTS) and trouble == "does not load":
                error = Message(Error(1, "no module named torch"), reply_to=reply)
                error.metadata.__dict__.update(reply.metadata.__dict__)
                return error
            return reply

    nodes = [*named(NAMES, folders), {"client-name": "museum", **told.get(trouble, {})}]
    if trouble not in told:  # it has not said who it is: it may be the one that is missing
        grid = Museum(nodes)
        del grid.contexts[grid.node(2)]
        fails = r"missing: client 2 \(university\); start their SuperNodes; node 1021 (does not say|cannot take part)"
        federate(grid, fails=fails, **{"flower.node-wait": 0.2})
    grid = Museum(nodes)
    run = federate(grid)
    assert run.finished
    assert grid.clients_asked("train") == [0, 1, 2]
    if trouble in told:
        assert "client 'museum', which flower.clients does not name: it is not asked" in caplog.text


def test_a_client_that_has_uploaded_may_be_in_any_state(federate: Federate, folders: list[Path]) -> None:
    changes = {"flower.node-wait": 0.2, "flower.upload-timeout": 1.0}
    grid = Sites(named(NAMES, folders))
    grid.tamper = lambda reply, client: [] if client == 1 else [reply]
    run = federate(grid, fails=r"missing: client 1 \(factory\)", **changes)
    unmounted = Sites(named(NAMES, [Path("/unmounted"), folders[1], folders[2]]))
    resumed = federate(unmounted, **changes, **{"resume-from": str(run.path)})
    assert resumed.finished
    assert unmounted.clients_asked("train") == [1]
    needed = Sites(named(NAMES, [folders[0], Path("/unmounted"), folders[2]]))
    federate(needed, fails="cannot take part: client factory: .* is no folder", **changes)


def test_a_node_with_another_name_is_told_of_once(
    federate: Federate, folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "LOOK", 0.02)
    nodes = [*named(NAMES[:2], folders[:2]), {"client-name": "stranger"}]
    changes = {"flower.node-wait": 0.5}
    federate(Sites(nodes), fails=r"missing: client 2 \(university\)", **changes)
    assert caplog.text.count("client 'stranger', which flower.clients does not name") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("in '/home/x rays/ann lee.png' it is cut short"), "client factory: in <path> it is cut short"),
        (RuntimeError("image of patient 17: /data/17.png"), "RuntimeError"),
    ],
)
def test_a_card_tells_of_trouble_what_an_error_would(
    folders: list[Path], error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("client_app.app.look_at_own", fail)
    grid = Sites(named(["factory"], folders[:1]))
    content = RecordDict({"config": order(Config.from_flat(OWN))})
    (reply,) = grid.send_and_receive([Message(content, grid.node(0), "query.describe")])
    assert reply.content["name"]["name"] == "factory"
    assert complaint(reply) == told


def test_own_images_need_flower() -> None:
    with pytest.raises(UserError, match=r"partition\.scheme = 'own' is for Flower's SuperNodes"):
        pipeline.run(Config.from_flat(OWN))
