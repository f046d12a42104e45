"""How much would leak if rolls were by single pixels: halted pixels inside alive tokens, simulated.

    python benchmarks/roll_leak.py        prints the table behind docs/LOG.md

A roll is by up to an eighth of the side along each axis, as SMI's. The alive patches lie at random or in one cluster.
After the roll the alive tokens stand where they stood ("stay"), or, which is the least that can leak, where the most
alive pixels are then ("best").
Shapes: g patches along a side, all of them N = g².
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.bench.markup import table
from fedmitr_flwr.common.rng import stream

DRAWS = 300
HEAD = ("Patches", "Pixels of a patch", "Alive", "Random, stay", "Random, best", "Cluster, stay", "Cluster, best")


class Case(NamedTuple):
    grid: int  # g
    patch: int  # pixels along a patch
    alive: int  # patches


class Leak(NamedTuple):
    """Share of halted pixels in alive tokens."""

    stay: float
    best: float


CASES = (Case(14, 16, 46), Case(7, 4, 23), Case(4, 2, 7))


def leak(alive_gg: Tensor, patch: int, roll: tuple[int, int]) -> Leak:
    """Of one roll, by (rows, columns) of pixels; `alive_gg` is True where a patch is alive."""
    pixels = alive_gg.float().repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    share_gg = F.avg_pool2d(pixels.roll(roll, (0, 1))[None], patch)[0]  # of alive pixels in each token
    best = share_gg.flatten().topk(int(alive_gg.sum())).values
    return Leak(1 - share_gg[alive_gg].mean().item(), 1 - best.mean().item())


def scattered(case: Case, rng: torch.Generator) -> Tensor:
    """(g, g), True = alive."""
    return _least(torch.rand(case.grid, case.grid, generator=rng), case.alive)


def clustered(case: Case, rng: torch.Generator) -> Tensor:
    """The patches nearest to a random one, which may lie at an edge: (g, g), True = alive."""
    row, column = torch.randint(case.grid, (2, 1), generator=rng)
    places = torch.arange(case.grid)
    distance_gg = ((places - row)[:, None].square() + (places - column).square()).float()
    return _least(distance_gg + torch.rand(case.grid, case.grid, generator=rng), case.alive)


def _least(values_gg: Tensor, count: int) -> Tensor:
    ids = values_gg.flatten().argsort()[:count]
    return torch.zeros(values_gg.numel(), dtype=torch.bool).scatter(0, ids, True).view_as(values_gg)


def mean_leak(case: Case, cluster: bool, draws: int = DRAWS, seed: int = 0) -> Leak:
    """Over random alive sets and rolls."""
    rng = stream(seed, "roll leak", *case, int(cluster))
    reach = case.grid * case.patch // 8
    drawn = []
    for _ in range(draws):
        alive = (clustered if cluster else scattered)(case, rng)
        rows, columns = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
        drawn.append(leak(alive, case.patch, (rows, columns)))
    return Leak(*torch.tensor(drawn).mean(0).tolist())


def markdown() -> str:
    lines = []
    for case in CASES:
        found = [share for cluster in (False, True) for share in mean_leak(case, cluster)]
        size = [f"{case.grid} x {case.grid}", f"{case.patch} x {case.patch}", str(case.alive)]
        lines.append([*size, *(f"{100 * share:.0f} %" for share in found)])
    return "\n".join(table(HEAD, lines))


if __name__ == "__main__":
    print(markdown())
