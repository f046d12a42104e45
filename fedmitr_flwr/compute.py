"""Where the arithmetic runs: the device, and a fixed number of CPU threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import ConfigError


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
    """Run with `count` CPU threads (0: one per core).

    Ray gives every actor its own thread count and sums are split by thread, so results would depend on who runs them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch's CPU allocator says so in the message only."""
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return no_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
