"""Means over seeds, and the test of two methods on the same seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Spread:
    """Some numbers, one of each seed."""

    by_seed: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return mean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1), which one number does not have."""
        return stdev(self.by_seed.values()) if self.n > 1 else None


def difference(ours: Spread, theirs: Spread) -> float:
    """Mean of ours - theirs over the seeds that both have, of which there must be one."""
    return mean(ours.by_seed[seed] - theirs.by_seed[seed] for seed in ours.by_seed.keys() & theirs.by_seed.keys())


def paired_p(ours: Spread, theirs: Spread) -> float | None:
    """The two-sided p-value of a paired t-test over the seeds that both have.

    None: fewer than two seeds, or the difference is the same for all, where the test says nothing.
    """
    from scipy.stats import ttest_rel  # here: it takes a second to import, and a grid may be refused

    seeds = sorted(ours.by_seed.keys() & theirs.by_seed.keys())
    differences = {round(ours.by_seed[seed] - theirs.by_seed[seed], 9) for seed in seeds}
    if len(seeds) < 2 or len(differences) < 2:
        return None
    return float(ttest_rel([ours.by_seed[s] for s in seeds], [theirs.by_seed[s] for s in seeds]).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of one family of tests, corrected for their number by Holm's step-down method, in the same order.

    The chance of any false finding among those below a level is at most that level, whatever the tests have in common.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [1.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = least
    return corrected
