"""Threads that share the cores, the memory that a piece of work took; and the bar or the lines of its progress."""

import io
import logging
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from fedmitr_flwr.common import progress
from fedmitr_flwr.common.compute import (
    ahead,
    as_made,
    forget_peak,
    peak_memory,
    return_memory,
    side_by_side,
    threads,
    usable_cores,
)
from fedmitr_flwr.common.progress import EVERY, Progress, on_screen

CPU = torch.device("cpu")
MEGABYTE = 1_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
def test_the_peak_is_of_what_was_done_since() -> None:
    forget_peak(CPU)
    before = peak_memory(CPU)["ram"] or 0
    torch.ones(300 * MEGABYTE // 4)  # pages that were really written
    with_it = peak_memory(CPU)["ram"] or 0
    forget_peak(CPU)
    assert with_it - max(before, peak_memory(CPU)["ram"] or 0) > 250 * MEGABYTE
    assert peak_memory(CPU)["gpu"] is None


def test_elsewhere_it_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=OSError))
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError))
    forget_peak(CPU)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory(CPU)["ram"] == pytest.approx(used * 1024, rel=0.01)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory(CPU)["ram"] == pytest.approx(used, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it does nothing")
def test_what_was_freed_is_returned_although_something_behind_it_is_in_use() -> None:
    return_memory()  # what other tests have left free would be taken first
    before = resident()
    pieces = [torch.ones(16_000) for _ in range(5000)]  # too small for glibc to map each by itself
    last = torch.ones(16_000)
    assert resident() - before > 250 * MEGABYTE
    del pieces
    return_memory()
    assert resident() - before < 100 * MEGABYTE
    assert last.sum() == 16_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_jobs_share_the_threads() -> None:
    for cores, jobs, at_once, each in ((1, 2, 1, 1), (2, 2, 2, 1), (4, 3, 3, 1), (4, 1, 1, 4)):
        with threads(cores):
            with side_by_side(jobs) as count:
                assert (count, torch.get_num_threads()) == (at_once, each)
            assert torch.get_num_threads() == cores


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    """What fails ahead fails in its turn."""
    made: list[int] = []
    second = Event()

    def items() -> Iterator[int]:
        yield 0
        second.set()
        made.append(1)
        yield 1
        raise ValueError("the third")

    every = ahead(items())
    assert next(every) == 0
    assert second.wait(10)  # for ever, if it were made only when it is asked for
    assert next(every) == 1
    with pytest.raises(ValueError, match="the third"):
        next(every)
    wanted = ahead(items())
    next(wanted)
    wanted.close()
    assert made == [1, 1]
    assert list(ahead(iter((1, 2)))) == [1, 2]


@pytest.mark.parametrize("fails", [True, False])
def test_who_is_still_at_work_learns_that_it_is_over(fails: bool) -> None:
    """Another has failed, or no one asks any longer. It would wait for ten seconds, and then fail the assertion."""
    learned = []

    def make(number: int, over: Event) -> int:
        if number == 0:
            learned.append(over.wait(10))
        elif fails:
            raise ValueError("the second")
        return number**2

    with closing(as_made(make, [0, 3], at_once=2)) as results, suppress(ValueError):
        assert next(results) == (3, 9)
    assert learned == [True]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_threads_are_the_cores_that_one_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    quota, period = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"
    cases: list[tuple[dict[str, str], int]] = [
        ({}, 8),
        ({"own": "0::/\n"}, 8),
        ({"own": "0::/\n", "cpu.max": "max 100000"}, 8),
        ({"own": "0::/\n", "cpu.max": "200000 100000"}, 2),
        ({"own": "0::/a/b\n", "a/cpu.max": "150000 100000", "a/b/cpu.max": "300000 100000"}, 2),  # 1.5 cores
        ({"own": "0::/a\n", "a/cpu.max": "5000 100000"}, 1),
        ({"own": "0::/a\n", "a/cpu.max": "damaged"}, 8),
        ({"own": "4:cpu,cpuacct:/\n2:memory:/\n", quota: "-1", period: "100000"}, 8),
        ({"own": "4:cpu,cpuacct:/a\n0::/\n", quota: "300000", period: "100000"}, 3),
    ]
    for number, (files, cores) in enumerate(cases):
        folder = tmp_path / str(number)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        assert usable_cores(folder, folder / "own") == cores, files
    with threads(0):
        assert torch.get_num_threads() == usable_cores()
    for asked, wanted in {"5": 5, "3,2": 3, "0": 8, "many": 8}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert usable_cores(tmp_path, tmp_path / "own") == wanted


# --- progress: a bar on a terminal, lines at intervals elsewhere


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
        "inversion: 300/1000 images, loss=0.3333, alive 50%, 25 images/s, 0:28 left",
        "inversion: 600/1000 images, loss=0.1667, alive 50%, 25 images/s, 0:16 left",
        "inversion: 900/1000 images, loss=0.1111, alive 50%, 25 images/s, 0:04 left",
        "inversion: 1000/1000 images, loss=0.1, alive 50%, 25 images/s, done in 0:40",
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
        "distil: 1/4 epochs, 0.0167 epochs/min, 3:00:00 left",
        "distil: 1/4 epochs, 0.0167 epochs/min, done in 1:00:00",
        "empty: 0/0 images, 0 images/s, done in 0:00",
        "slow: 0/5 images, 0 images/s",
        "slow: 0/5 images, 0 images/s, done in 0:01",
        "wrong: 1/4 epochs, 1 epochs/s, stopped after 0:01",
    ]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Stands in for stderr, once a test has put it there; the log goes there."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(terminal)])
    logging.getLogger("fedmitr").setLevel(logging.INFO)
    return terminal


def at_work() -> None:
    with on_screen(), Progress("inversion", 4, "images", every=0) as bar:
        bar.update(3, loss=0.25)
        logging.getLogger("fedmitr").info("a line")
        bar.update(1, loss=0.125)


def test_a_terminal_has_a_live_line_below_the_log_and_keeps_the_last_state(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal)
    at_work()
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    assert re.search(r"inversion +━+ +\d\d:\d\d +4/4 images, loss=0.125, ", said)
    assert re.search(r"^a line\s*$", said, re.MULTILINE)
    assert said.rstrip().splitlines()[-1].split() == ["total", "0:00:00"]
    with Progress("alone", 1, "models"):
        pass
    assert "alone" in terminal.getvalue()
    assert logging.getLogger().handlers[0].stream is terminal  # type: ignore[attr-defined]


def test_there_are_no_escapes_without_a_terminal_or_with_no_color(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    at_work()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    at_work()
    lines = terminal.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == 2 * [
        "inversion: 3/4 images",
        "a line",
        "inversion: 4/4 images",
        "inversion: 4/4 images",
    ]
    assert "\x1b" not in terminal.getvalue()


def test_many_clients_are_a_line_a_minute(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with Progress.of_clients(1000) as bar:
        for _ in range(1000):
            clock.now += 0.25
            bar.update()
    assert [line.split(",")[0] for line in caplog.messages] == [
        f"clients: {done}/1000 clients" for done in (240, 480, 720, 960, 1000)
    ]


def test_what_is_slow_has_a_rate_by_the_minute(clock: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    with Progress("clients", 2, "clients") as bar:
        clock.now += 60
        bar.update()
    assert caplog.messages[0] == "clients: 1/2 clients, 1 clients/min, 1:00 left"


def test_who_reads_the_log_of_another_process_hears_of_the_beginning(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EVERY, "2")
    with Progress("inversion", 3, "images") as bar:
        for _ in range(3):
            clock.now += 1
            bar.update()
    assert [line.split(",")[0] for line in caplog.messages] == [f"inversion: {n}/3 images" for n in (0, 2, 3)]
