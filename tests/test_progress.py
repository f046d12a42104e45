"""Progress: a bar on a terminal, lines at intervals elsewhere."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from fedmitr_flwr.common import progress
from fedmitr_flwr.common.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> SimpleNamespace:
    """Stands in for the module's `time`."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    caplog.set_level(logging.INFO, "fedmitr")
    return clock


def test_one_line_per_interval_with_rate_and_time_left(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    with Progress("inversion", 1000, "images") as bar:
        for step in range(10):
            clock.now += 4
            bar.update(100, loss=1 / (step + 1), alive=0.5)
    # 25 images/s; after 12, 24 and 36 s, since those are the first updates 10 s after the last line.
    assert caplog.messages == [
        "inversion: 300/1000 images, loss=0.3333, alive=0.5, 25 images/s, 0:28 left",
        "inversion: 600/1000 images, loss=0.1667, alive=0.5, 25 images/s, 0:16 left",
        "inversion: 900/1000 images, loss=0.1111, alive=0.5, 25 images/s, 0:04 left",
        "inversion: 1000/1000 images, loss=0.1, alive=0.5, 25 images/s, done in 0:40",
    ]


def test_short_work_is_one_line_and_hours_are_shown(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        with Progress("wrong", 4, "epochs") as bar:
            bar.update()
            clock.now += 1
            raise RuntimeError("boom")

    with Progress("client 3", 2, "epochs") as bar:
        bar.update()
        clock.now += 4
        bar.update(loss=torch.tensor(2.5))
    with Progress("distil", 4, "epochs", every=3600) as bar:
        clock.now += 3600
        bar.update()
    with Progress("empty", 0, "images"):  # nothing done divides by nothing
        pass
    with Progress("slow", 5, "images", every=0) as bar:
        clock.now += 1
        bar.update(0)
    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert caplog.messages == [
        "client 3: 2/2 epochs, loss=2.5, 0.5 epochs/s, done in 0:04",
        "distil: 1/4 epochs, 0.000278 epochs/s, 3:00:00 left",
        "distil: 1/4 epochs, 0.000278 epochs/s, done in 1:00:00",
        "empty: 0/0 images, 0 images/s, done in 0:00",
        "slow: 0/5 images, 0 images/s",
        "slow: 0/5 images, 0 images/s, done in 0:01",
        "wrong: 1/4 epochs, 1 epochs/s, stopped after 0:01",
    ]


def test_a_bar_on_a_terminal_and_no_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedmitr")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("inversion", 4, "images", every=0) as bar:
        bar.update(3, loss=0.25)
        bar.update(1, loss=0.125)
    assert caplog.messages == []
    assert re.search("inversion.*4/4.*loss=0.125", terminal.getvalue())
