"""What the machine gives: seconds, peak memory of a piece of work, and the FLOP/s of a large matrix product."""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from fedmitr_flwr.common.compute import whole_float32

T = TypeVar("T")

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}  # rows of the matrices
PEAK_REPEATS = 5
MIB = 2**20


class Cost(NamedTuple):
    """Of a piece of work. Memory in MiB; None where it cannot be known."""

    seconds: float
    start_mib: float | None  # before
    peak_mib: float | None


def synchronised(device: torch.device) -> float:
    """The clock, once the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(work: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """Do `work`, and say what it cost.

    On CUDA memory is what torch's allocator has given. On Linux it is the process's resident size, with the
    interpreter, torch and the teachers; the kernel's mark of the highest one is set back before the work, after freed
    memory was given back. No thread samples it, and no peak is missed. Elsewhere there is no such mark.
    """
    begin = _set_back(device)
    start = synchronised(device)
    result = work()
    seconds = synchronised(device) - start
    return result, Cost(seconds, begin, None if begin is None else peak(device))


def _set_back(device: torch.device) -> float | None:
    """Forget earlier peaks. Returns the memory now, in MiB; None where it cannot be known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(CLEAR, os.W_OK):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim:
            trim(0)
        CLEAR.write_text("5", encoding="ascii")
    else:
        return None
    return peak(device)


def peak(device: torch.device) -> float:
    """The most memory that was in use, in MiB; off CUDA the process's, on Linux only."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024  # from kB


def peak_flops(device: torch.device, size: int = 0) -> float:
    """FLOP/s in float32: the product of two (size, size) matrices, at its best.

    Size 0: large for the device.
    """
    size = size or PEAK_SIZE.get(device.type, PEAK_SIZE["cpu"])
    rng = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=rng).to(device)
    seconds = []
    with whole_float32():
        torch.matmul(matrix, matrix)  # the first call also starts threads and picks kernels
        for _ in range(PEAK_REPEATS):
            start = synchronised(device)
            torch.matmul(matrix, matrix)
            seconds.append(synchronised(device) - start)
    return 2 * size**3 / min(seconds)
