"""Clients with folders of their own, through the Flower apps: the bits of the shares that lie in the folders."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_grid import TINY, LocalGrid, server_context, task_identity
from sites import Sites, named
from tiny import timeless

from deploy.demo_data import as_folders, as_parquet
from fedmitr_flwr import pipeline
from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.errors import UserError
from fedmitr_flwr.report.run_folder import RunFolder
from server_app.app import app as server_app

CLIENTS = 3
NAMES = ("hospital-a", "factory", "university")
DIGITS = tuple("0123456789")
SHARED = TINY | {"data.train-limit": 0, "partition.scheme": "dirichlet", "partition.clients": CLIENTS, "seed": 2}
OWN = SHARED | {"partition.scheme": "own"}

Federate = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def shares() -> list[Images]:
    """Of unequal sizes and with unequal classes."""
    return [client_images(Config.from_flat(SHARED), client)[0] for client in range(CLIENTS)]


@pytest.fixture
def folders(shares: list[Images], tmp_path: Path) -> list[Path]:
    return [as_parquet(tmp_path / f"site {client}", images, DIGITS) for client, images in enumerate(shares)]


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federate]:
    """Run the federation; gives the newest run folder, also after a failure."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    runs = iter(range(1, 100))

    def run(grid: LocalGrid, fails: str = "", **changes: Any) -> RunFolder | None:
        context = server_context(OWN | {"out-dir": str(tmp_path / "out")} | changes, next(runs))
        if fails:
            with pytest.raises(UserError, match=fails):
                server_app(grid, context)
        else:
            server_app(grid, context)
        found = sorted((tmp_path / "out").glob("*"), key=lambda path: path.stat().st_mtime)
        return RunFolder.open(found[-1]) if found else None

    with task_identity():
        yield run


def contents(folder: RunFolder) -> list[bytes]:
    return [timeless(path) for path in [*folder.upload_paths().values(), folder.model_path]]


@pytest.fixture(scope="module")
def dealt(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same experiment with shares of one data set, in one process."""
    out = str(tmp_path_factory.mktemp("dealt"))
    return pipeline.run(Config.from_flat(SHARED | {"out-dir": out}), "run")


@pytest.mark.parametrize("numbered", [False, True])
def test_own_folders_give_the_bits_of_the_shares_in_them(
    federate: Federate, folders: list[Path], dealt: RunFolder, numbered: bool
) -> None:
    """Named in whatever order the nodes come; or numbered by hand."""
    nodes = named(NAMES, folders)
    if numbered:
        nodes = [
            {"partition-id": client, "num-partitions": CLIENTS, "data-path": str(path)}
            for client, path in enumerate(folders)
        ]
    names = "" if numbered else " | ".join(NAMES)
    run = federate(Sites(nodes[::-1]), **{"flower.clients": names})
    assert contents(run) == contents(dealt)
    result, simulated = run.read_result(), dealt.read_result()
    for key in ("accuracy", "evaluated_on", "clients", "bytes_up"):
        assert result[key] == simulated[key]
    assert result.get("client_names") == (None if numbered else list(NAMES))
    assert result["counts"] is None  # the clients did not tell
    assert run.config.data.class_names == DIGITS
    assert not run.partition_path.exists()


def test_class_counts_are_told_by_choice(federate: Federate, folders: list[Path], dealt: RunFolder) -> None:
    changes = {"flower.clients": "|".join(NAMES), "upload.class-counts": True}
    run = federate(Sites(named(NAMES, folders)), **changes)
    assert run.read_result()["counts"] == dealt.read_result()["counts"]
    assert run.partition_path.exists()


def test_one_class_one_site_and_many_sizes(federate: Federate, shares: list[Images], tmp_path: Path) -> None:
    """A client of a single class takes part like the others, and all that holds them is an ImageFolder."""
    ones = shares[0].subset((shares[0].labels == 1).nonzero().flatten())
    sites = [ones, *shares[1:]]
    folders = [as_folders(tmp_path / str(number), images, DIGITS) for number, images in enumerate(sites)]
    run = federate(Sites(named(NAMES, folders)), **{"flower.clients": "|".join(NAMES), "partition.min-size": 1})
    assert [upload.num_examples for upload in run.load_uploads()] == [len(images) for images in sites]
    assert len(ones) < min(len(shares[1]), len(shares[2]))


def test_the_clients_evaluate_without_any_image_at_the_server(
    federate: Federate, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmitr_flwr.data.own.open_split", lambda *_: pytest.fail("the server read images"))
    changes = {"flower.clients": "|".join(NAMES), "evaluate.where": "clients", "evaluate.holdout": 0.2}
    run = federate(Sites(named(NAMES, folders)), **changes)
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
    changes = {"flower.clients": "|".join(NAMES), "flower.node-wait": 0.2, "flower.upload-timeout": 1.0}
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
    run = federate(Sites(named(NAMES, folders)), **{"flower.clients": "|".join(NAMES), "flower.strategy": "fedavg"})
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
        ({"client-name": "stranger"}, {}, r"2 of 3 nodes .* missing: client 0 \(hospital-a\); start their SuperNodes"),
    ],
)
def test_contradictions_are_told_before_anybody_trains(
    federate: Federate, folders: list[Path], change: dict[str, Any], settings: dict[str, Any], fails: str
) -> None:
    nodes = named(NAMES, folders)
    nodes[0] = {key: value for key, value in {**nodes[0], **change}.items() if value is not None}
    grid = Sites(nodes)
    changes = {"flower.clients": "|".join(NAMES), "flower.node-wait": 0.2, **settings}
    federate(grid, fails=fails, **changes)
    assert grid.clients_asked("train") == []


def test_nodes_of_other_federations_are_left_alone(
    federate: Federate, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [*named(NAMES, folders), {"client-name": "stranger", "data-path": str(folders[0])}]
    grid = Sites(nodes)
    federate(grid, **{"flower.clients": "|".join(NAMES)})
    assert grid.clients_asked("train") == [0, 1, 2]
    assert "client 'stranger', which flower.clients does not name: it is not asked" in caplog.text


def test_own_images_need_flower() -> None:
    with pytest.raises(UserError, match=r"partition\.scheme = 'own' is for Flower's SuperNodes"):
        pipeline.run(Config.from_flat(OWN))
