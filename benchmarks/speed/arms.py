"""The arms of the speed benchmark: their settings, and their interleaved measurement."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fedmitr_flwr.common.compute import resolve_device
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.text import read_settings
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert

from .flops import Shape, bound, stages
from .gauges import measure
from .rows import Arm, Plan, Row, Run, row, with_ratios
from .uploads import asked, class_counts, draw_targets

Report = Callable[[int, Arm, Run], None]  # number of the repeat


def arms_of(teachers: int, options: argparse.Namespace) -> list[Arm]:
    """Those that share an ensemble, in the order of the table."""
    return [Arm(mode, teachers, route) for route, mode in product(options.route, options.modes)]


def config_of(arm: Arm, options: argparse.Namespace, steps: int | None = None) -> Config:
    """The arm's settings, at T = `steps` or what the options say.

    Raises:
        ConfigError: an unknown setting or an impossible value.
    """
    flat: dict[str, object] = {"upload.extras": "counts", "ensemble.weights": "counts", "data.flip": True}
    flat |= {"model.name": options.model, "model.img-size": options.img_size, "model.patch-size": options.patch_size}
    flat |= {"model.in-chans": 3, "model.num-classes": options.num_classes, "model.weights": options.weights}
    flat |= {"inversion.mode": arm.mode, "inversion.steps": steps or options.steps, "inversion.route": arm.route}
    flat |= {"inversion.batch-size": options.batch, "inversion.stops": options.stops}
    return Config.from_flat(flat | read_settings(None, options.set, Config().to_flat()))


def short_steps(arm: Arm, options: argparse.Namespace) -> int:
    """The fewest steps that show every number of alive patches of the full run, and the remainder of T / v."""
    config = config_of(arm, options)
    if (v := config.inversion.images_each) > 1:
        return v + config.inversion.steps % v
    wanted, tried = len(stages(config)), range(1, options.steps + 1)
    return next(steps for steps in tried if len(stages(config_of(arm, options, steps))) == wanted)


class Bench:
    """The arms of one number of teachers, which share the ensemble."""

    def __init__(self, arms: Sequence[Arm], ensemble: Ensemble, options: argparse.Namespace) -> None:
        self.arms, self.ensemble, self.options = list(arms), ensemble, options
        self.device = resolve_device(options.device)
        self.runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}

    def run(self, report: Report) -> None:
        """Warm up, then every repeat: each arm once, beginning with another one each time."""
        for arm in self.arms * self.options.warmup:
            self.warm_up(arm)
        for repeat in range(self.options.repeats):
            first = repeat % len(self.arms)
            for arm in self.arms[first:] + self.arms[:first]:
                losses, cost = measure(self.work(arm, repeat), self.device)
                self.runs[arm].append(Run(cost, tuple(filter(math.isfinite, losses.tolist()))))
                report(repeat, arm, self.runs[arm][-1])

    def warm_up(self, arm: Arm) -> None:
        """A short run, which must take the steps that are counted on paper.

        Raises:
            RuntimeError: it took others, so FLOPs and bounds would be wrong.
        """
        steps = short_steps(arm, self.options)
        config = config_of(arm, self.options, steps)
        seen, planned = Counter[int](), Counter[int]()

        def on_step(_loss: float, alive: float) -> None:
            seen[round(alive * config.model.num_patches)] += 1

        self.work(arm, -1, steps, on_step=on_step)()
        for stage in stages(config):
            planned[stage.alive] += stage.steps
        if seen != planned:
            raise RuntimeError(f"{arm}: steps by alive patches are {dict(seen)}, flops.py counts {dict(planned)}")

    def work(self, arm: Arm, repeat: int, steps: int | None = None, **more: Any) -> Callable[[], Tensor]:
        """What is measured; it returns the final losses. Equal repeats have equal targets and noise."""
        config, targets = config_of(arm, self.options, steps), self.targets(repeat)
        rng = stream(self.options.seed, "inversion", repeat)
        return lambda: (
            invert(self.ensemble, targets, config.inversion, config.model, flip=config.data.flips, rng=rng, **more).loss
        )

    def targets(self, repeat: int) -> Tensor:
        options = self.options
        return draw_targets(options.batch, options.num_classes, stream(options.seed, "targets", repeat))

    def rows(self, shape: Shape, peak_flops: float) -> list[Row]:
        """Of all arms, after `run`."""
        rows, bounds = {}, {}
        for arm, runs in self.runs.items():
            config = config_of(arm, self.options)
            rows[arm] = row(arm, runs, self.plan(arm, config, shape), peak_flops)
            bounds[arm] = bound(shape, config, config_of(replace(arm, mode="dense"), self.options))
            rows[arm] |= {"img_size": config.model.img_size, "patches": config.model.num_patches}
            rows[arm] |= {"batch": config.inversion.batch_size}
        return with_ratios(rows, bounds)

    def plan(self, arm: Arm, config: Config, shape: Shape) -> Plan:
        by_class = torch.tensor(asked(class_counts(arm.teachers, config.model.num_classes), arm.route))
        drawn = torch.cat([self.targets(repeat) for repeat in range(self.options.repeats)])
        teachers_each = by_class[drawn].float().mean().item()
        batch = self.options.batch
        return Plan(
            steps=config.inversion.steps,
            images=batch * config.inversion.images_each,
            flops=batch * teachers_each * shape.run_flops(stages(config)),
            teachers_each=teachers_each,
        )
