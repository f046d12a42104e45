"""Threads that share the cores; and the memory that a piece of work took, without what was there before and after."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import pytest
import torch

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
