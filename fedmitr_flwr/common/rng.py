"""Randomness is an argument: one private generator per purpose, named by a path."""

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

_GLOBAL = RLock()
# torch's Mersenne twister, as `get_state` gives it: seed and counters, 24 bytes, and then its words, 8 bytes each.
_HEAD, _WORDS = 24, 624


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose. Equal paths give equal seeds; different paths give unrelated ones."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(seed: int, *path: str | int) -> torch.Generator:
    """A private CPU generator for one purpose, e.g. `stream(seed, "local", client)`.

    Draws are made on the CPU and moved afterwards, so they do not depend on the device or on the order of calls.
    """
    return torch.Generator().manual_seed(derive(seed, *path))


def secret() -> torch.Generator:
    """A CPU generator that cannot be repeated: its state is of the operating system's entropy, and is kept nowhere.

    The whole state, for of a seed torch takes 32 bits, which one could try all.
    """
    rng = torch.Generator().manual_seed(0)
    state = rng.get_state()
    words = torch.tensor([secrets.randbits(32) for _ in range(_WORDS)])
    state[_HEAD : _HEAD + 8 * _WORDS] = words.view(torch.uint8)
    return rng.set_state(state)


@contextmanager
def seeded_init(seed: int, *path: str | int) -> Iterator[None]:
    """Give code that can only draw from torch's global generator (module initialisers) a private stream.

    One thread at a time: the generator is global.
    """
    with _GLOBAL, torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, *path))
        yield
