"""Where the arithmetic runs: the device, a fixed number of CPU threads, and the memory that it takes."""

import ctypes
import gc
import math
import os
import resource
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Event
from typing import TypeVar

import torch

from .errors import ConfigError

A = TypeVar("A")
T = TypeVar("T")

_M_ARENA_MAX = -8  # of malloc.h


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; any other name is torch's own (`cpu`, `cuda:1`)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device = {name!r} is not a torch device; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}, but torch sees no CUDA device here; use device = 'cpu'")
    return device


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` CPU threads (0: OMP_NUM_THREADS, else one for each core that this process may use).

    Ray gives every actor its own thread count and sums are split by thread, so results would depend on who runs them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many threads can be at work at once: what OMP_NUM_THREADS says, or the cores that are this process's.

    Fewer than the machine's where its affinity (`taskset`, a batch system) or its cgroup's CPU quota (a container) says
    so; a fraction of a core counts as one. Version 2 of Linux's cgroups is mounted at `cgroups`, and `cpu` of version 1
    within it; `own` lists those of this process.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is for nested parallelism
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(min(_quotas(cgroups, own), default=cores))))


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's cgroups and of all above them."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = cgroups if not controllers else cgroups / "cpu"
            place = PurePosixPath(group.lstrip("/"))
            for folder in (root / place, *(root / above for above in place.parents)):
                files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                with suppress(OSError, ValueError):  # no limit: "max" or -1, or no such file
                    quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
                    if quota > 0 and period > 0:
                        yield quota / period


@contextmanager
def side_by_side(jobs: int) -> Iterator[int]:
    """Split the CPU threads evenly among `jobs` that run in Python threads of their own; gives how many run at once.

    The matrices of a small model are too small to be shared by threads: two jobs on a thread each take little more than
    half the time of one after the other on two threads.
    """
    cores = torch.get_num_threads()
    at_once = max(1, min(jobs, cores))
    with threads(max(1, cores // at_once)):
        yield at_once


def _pool(count: int) -> ThreadPoolExecutor:
    """Each with as many threads of torch as this one: in a new one convolutions take all cores, with other bits."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items in the same order, each made by another thread while the one before is in use."""
    nothing = object()
    with _pool(1) as worker:
        coming = worker.submit(next, items, nothing)
        while (item := coming.result()) is not nothing:
            coming = worker.submit(next, items, nothing)
            yield item  # type: ignore[misc]


def as_made(make: Callable[[A, Event], T], arguments: Iterable[A], at_once: int) -> Generator[tuple[A, T], None, None]:
    """Each argument with `make(argument, over)`, in the order in which they are done by so many threads.

    `over` is set when another task fails or the caller stops iterating; tasks should then raise. Use it
    in `contextlib.closing`.
    """
    over = Event()
    with _pool(at_once) as workers:
        coming = {workers.submit(make, argument, over): argument for argument in arguments}
        try:
            for done in as_completed(coming):
                yield coming[done], done.result()
        finally:
            over.set()


@contextmanager
def whole_float32() -> Iterator[None]:
    """CUDA does not round the inputs of float32 products and convolutions to 10 bits; torch would, of the latter."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch's CPU allocator says so in the message only."""
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return no_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from here. Linux can; elsewhere the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Bytes that the process held at most since `forget_peak`: `ram`, all of it, and `gpu`, what torch had there."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"ram": _peak_ram(), "gpu": gpu}


def _peak_ram() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used  # bytes there, kilobytes elsewhere


def share_memory() -> None:
    """Let threads that begin from here on take memory from one heap: of each other one, glibc keeps up to 64 MB.

    Flower fetches models in threads of their own, which end with each fetch.
    """
    _glibc("mallopt", _M_ARENA_MAX, 1)


def return_memory(*, cycles: bool = True) -> None:
    """Give unused memory back to the operating system: otherwise, Python and glibc keep whole models' worth.

    What refers to itself is looked for among all objects: of K networks in memory K times, unless `cycles` is False.
    """
    if cycles:
        _leave_out_imports()
        gc.collect()
    _glibc("malloc_trim", 0)


@cache
def _leave_out_imports() -> None:
    """Modules are never garbage, and to look through torch's takes the collector a second each time."""
    gc.collect()
    gc.freeze()


def _glibc(function: str, *numbers: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl has no such functions
            getattr(ctypes.CDLL(None), function)(*numbers)
