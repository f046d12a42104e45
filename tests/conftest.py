"""What every test shares: no network, few threads, the shared real data sets and a tiny separable one."""

import errno
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, so this stands before all other imports.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    MPLBACKEND="Agg",
)

import hypothesis
import pytest
import torch

from fedmitr_flwr.data.images import DataSet, Images

# A busy machine is no failure: no deadline per example.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=50)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of real deployments run only where `-m` names them; no two tests that start Flower or Ray run at once."""
    if "deploy" not in config.getoption("-m"):
        items[:] = [item for item in items if not item.get_closest_marker("deploy")]
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from more, and equal thread counts make results equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _pictures_are_empty() -> Iterator[None]:
    """Drawing them takes longer than all else in a tiny run; `tiny.draw` has them drawn."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_images", "save_partition"):
            patch.setattr(f"fedmitr_flwr.pipeline.{name}", lambda *given: given[-1].touch())
        yield


@pytest.fixture(autouse=True, scope="module")
def _imports_are_no_garbage() -> None:
    """What was imported so far is left out of collections, of which `return_memory` asks for one per client."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _core_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who imports Flower's apps sends the core's log to Flower's alone, where caplog does not listen."""
    core = logging.getLogger("fedmitr")
    monkeypatch.setattr(core, "propagate", True)
    monkeypatch.setattr(core, "handlers", [])


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What `fedmitr` sets for its process is given back: handlers of logs and signals, and levels."""
    root = logging.getLogger()
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    levels = {logger: logger.level for logger in map(logging.getLogger, ("fedmitr", "fedmitr.bench"))}
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers
    for logger, level in levels.items():
        logger.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimisers step by the gradients alone: neither decay nor clipping."""
    monkeypatch.setattr("fedmitr_flwr.vit.optim.WEIGHT_DECAY", 0.0)
    monkeypatch.setattr("fedmitr_flwr.vit.optim.GRAD_CLIP", float("inf"))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no file can be written out."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.fixture
def federate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`local_grid.federate` into a folder of the test's own."""
    from local_grid import federate  # Flower is imported by those only who use it

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    return partial(federate, tmp_path / "out")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets and weights that lies beside the repository on development machines."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the real data sets in ../shared, which are not part of the repository")
    return folder


@pytest.fixture(scope="session")
def tiny() -> DataSet:
    """Three classes of 8 x 8 grey images (60 train, 30 test): class y is bright in its own rows, under noise."""
    return DataSet(_bars(60, seed=0), _bars(30, seed=1), ("top", "middle", "bottom"))


def _bars(total: int, seed: int) -> Images:
    labels = torch.arange(total) % 3
    noise = torch.randint(0, 60, (total, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    bright = (torch.arange(8)[None] // 2 == labels[:, None]).long() * 180  # (n, 8) by row of the image
    return Images((noise + bright[:, None, :, None]).to(torch.uint8), labels)
