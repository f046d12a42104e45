"""Randomness as an argument: equal paths give equal draws, different paths unrelated ones, nothing global moves."""

import random
import secrets

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmitr_flwr.common.rng import derive, secret, seeded_init, stream

PATHS = st.lists(st.one_of(st.text(max_size=8), st.integers(-5, 5)), max_size=4).map(tuple)


def test_seeds_are_fixed_for_all_times() -> None:
    """SHA-256 of the path's repr: another Python, torch or machine derives the same."""
    first_8_bytes = "91d6039a01f57163"  # echo -n '(0,)' | sha256sum
    assert derive(0) == int.from_bytes(bytes.fromhex(first_8_bytes), "little") >> 1


@given(PATHS, PATHS, st.integers(0, 3), st.integers(0, 3))
def test_different_paths_give_different_seeds(
    one: tuple[str | int, ...], two: tuple[str | int, ...], seed: int, other: int
) -> None:
    assert (derive(seed, *one) == derive(other, *two)) is ((seed, *one) == (other, *two))
    assert 0 <= derive(seed, *one) < 2**63


def test_equal_streams_draw_equally_and_neighbours_are_unrelated() -> None:
    """The means of 1,000 streams' first uniform draws: 1/2, with a deviation of 0.009."""
    first = torch.stack([torch.rand(1, generator=stream(0, "local", client)) for client in range(1000)])
    assert torch.equal(first[3], torch.rand(1, generator=stream(0, "local", 3)))
    assert first.mean().item() == pytest.approx(0.5, abs=0.04)
    assert first.std().item() == pytest.approx(12**-0.5, abs=0.03)


def test_a_stream_does_not_touch_the_global_generators() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    torch.randn(10, generator=stream(0, "x"))
    with seeded_init(0, "init"):
        inside = torch.randn(3)
    with pytest.raises(RuntimeError, match="negative dimension"), seeded_init(0):
        torch.randn(torch.randint(-2, -1, (1,)).item())  # draws, then fails
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert torch.equal(inside, torch.randn(3, generator=stream(0, "init")))


def test_a_secret_stream_has_all_its_words_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own Mersenne twister with the same words draws the same."""
    source = random.Random(5)
    words = [source.getrandbits(32) for _ in range(624)]
    asked = iter(words)
    monkeypatch.setattr(secrets, "randbits", lambda bits: next(asked) if bits == 32 else None)
    drawn = torch.randint(2**16, (1000,), generator=secret())
    python = random.Random()
    python.setstate((3, (*words, 624), None))
    assert drawn.tolist() == [python.getrandbits(32) % 2**16 for _ in range(1000)]
    assert next(asked, None) is None
