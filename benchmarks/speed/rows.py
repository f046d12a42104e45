"""Rows of the speed benchmark, from what was measured and what was planned."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from .gauges import Cost

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to make images; arms that differ in the mode only are compared."""

    mode: str  # dense | sparse | pri4
    teachers: int
    route: float

    def rivals(self) -> tuple[object, ...]:
        """Equal for arms that are compared."""
        return tuple(value for name, value in asdict(self).items() if name != "mode")

    def __str__(self) -> str:
        return f"{self.mode} K={self.teachers}" + (f" route {self.route:g}" if self.route else "")


@dataclass(frozen=True)
class Run:
    """One measured call of `invert`."""

    cost: Cost
    losses: tuple[float, ...]  # the finite ones: an image without one is not finished


@dataclass(frozen=True)
class Plan:
    """What an arm is to do, on paper."""

    steps: int  # T
    images: int  # finished, per run
    flops: float  # of the optimisation steps, mean over the repeats
    teachers_each: float  # that an image is given to, mean over the repeats


def row(arm: Arm, runs: Sequence[Run], plan: Plan, peak_flops: float) -> Row:
    """All that an arm says of itself; `with_ratios` adds how it compares."""
    seconds = [run.cost.seconds for run in runs]
    losses = [loss for run in runs for loss in run.losses]
    begins = [run.cost.start_mib for run in runs if run.cost.start_mib is not None]
    peaks = [run.cost.peak_mib for run in runs if run.cost.peak_mib is not None]
    images = min(len(run.losses) for run in runs)
    middle = median(seconds)
    return asdict(arm) | {
        "steps": plan.steps,
        "seconds": seconds,
        "seconds_median": middle,
        "seconds_spread": [min(seconds), max(seconds)],
        "seconds_per_step": middle / plan.steps,
        "teachers_each": plan.teachers_each,
        "images": images,
        "images_planned": plan.images,
        "images_per_second": images / middle,
        "flops": plan.flops,
        "mfu": plan.flops / middle / peak_flops,
        "start_mib": max(begins, default=None),
        "peak_mib": max(peaks, default=None),
        "loss": _summary(losses) if losses else None,
    }


def _summary(losses: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(losses), "min": min(losses), "max": max(losses), "count": len(losses)}


def with_ratios(rows: Mapping[Arm, Row], bounds: Mapping[Arm, float]) -> list[Row]:
    """Add to each row how many times more images per second it gives than the dense arm among its rivals."""
    dense = {arm.rivals(): row for arm, row in rows.items() if arm.mode == "dense"}
    compared = []
    for arm, each in rows.items():
        ratio = each["images_per_second"] / dense[arm.rivals()]["images_per_second"]
        ratios = {"ratio_to_dense": ratio, "ratio_bound": bounds[arm], "bound_fraction": ratio / bounds[arm]}
        compared.append(each | ratios)
    return compared
