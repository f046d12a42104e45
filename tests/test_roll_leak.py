"""What rolls by single pixels would leak: by hand, and the table of the decision."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # no package: it is where the script runs

import roll_leak
from roll_leak import Case, leak

from fedmitr_flwr.common.rng import stream

ROOT = Path(__file__).parents[1]
ONE = torch.eye(9).bool()[4].view(3, 3)  # the patch in the middle
ROW = torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()


@pytest.mark.parametrize(
    ("alive", "roll", "stay", "best"),
    [
        (ONE, (0, 0), 0, 0),
        (ONE, (1, 0), 1 / 4, 1 / 4),  # one of four rows of pixels comes from the neighbour
        (ONE, (1, 1), 7 / 16, 7 / 16),  # 3 · 3 of 4 · 4 pixels stay
        (ONE, (0, -3), 3 / 4, 1 / 4),  # the neighbour has three of four columns now
        (ROW, (0, 1), 1 / 8, 1 / 8),  # the left one loses a column to a halted patch, the right one to the left
        (ROW, (1, 0), 1 / 4, 1 / 4),
    ],
)
def test_one_roll_by_hand(alive: Tensor, roll: tuple[int, int], stay: float, best: float) -> None:
    """Patches of 4 x 4 pixels."""
    assert leak(alive, 4, roll) == pytest.approx((stay, best))


@pytest.mark.parametrize("draw", [roll_leak.scattered, roll_leak.clustered])
@pytest.mark.parametrize("patches", [(1, 0), (-1, 2), (3, 3)])
def test_a_roll_by_whole_patches_leaks_nothing_where_positions_follow(
    draw: Callable[[Case, torch.Generator], Tensor], patches: tuple[int, int]
) -> None:
    case = Case(grid=7, patch=4, alive=23)
    alive = draw(case, stream(0, "alive"))
    assert alive.sum() == case.alive
    rolled = leak(alive, case.patch, (4 * patches[0], 4 * patches[1]))
    moved = alive.roll(patches, (0, 1))
    assert rolled.best == 0
    assert rolled.stay == pytest.approx((alive & ~moved).sum() / 23)


def test_a_cluster_is_together() -> None:
    """5 alive patches: the middle and its neighbours, or, at an edge or in a corner, within two steps of it."""
    case, rng = Case(grid=9, patch=2, alive=5), stream(0, "cluster")
    for _ in range(20):
        places = roll_leak.clustered(case, rng).nonzero()
        assert (places.max(0).values - places.min(0).values).max() <= 2


def test_the_decision_has_the_script_s_table() -> None:
    decision = (ROOT / "docs" / "adr" / "0004-rolls.md").read_text(encoding="utf-8")
    assert roll_leak.markdown() in decision
