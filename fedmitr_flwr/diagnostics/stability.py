"""Replace-one stability: two students of one seed, whose pools differ in one batch of images.

Shapes: M images of a probe, P weights.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from ..common.rng import stream
from ..config import Config
from ..distillation.distil import count_batches, distil, student_stepper
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool, join
from .gap import Shown

Moment = tuple[Tensor, dict[str, Tensor]]  # a student's weights (P,), and by probe the loss of each image (M,)


def behind(pool: Pool, count: int) -> Pool:
    """All images but the first `count`."""
    return pool.rows(torch.arange(count, len(pool), device=pool.targets.device))


def train(
    student: VisionTransformer, ensemble: Ensemble, pool: Pool, config: Config, probes: Mapping[str, Shown]
) -> dict[int, Moment]:
    """Train `student` in place; the moments by step, at 0, 1, 2, 4, ... and the end. The seed is the run's."""
    total, found = count_batches(len(pool), config), dict[int, Moment]()
    wanted = {0, total, *(2**power for power in range(total.bit_length()))}
    step = 0

    def look() -> None:
        if step in wanted:
            weights = parameters_to_vector(student.parameters()).detach().clone()
            found[step] = weights, {name: probe.losses(student) for name, probe in probes.items()}

    def on_batch(*_: object) -> None:
        nonlocal step
        step += 1
        look()

    look()
    rng = stream(config.seed, "diagnostics", "distillation")
    distil(student, ensemble, pool, config, student_stepper(student, config, total), rng, on_batch)
    return found


def replace_one(
    start: VisionTransformer,
    ensemble: Ensemble,
    pool: Pool,
    others: Pool,
    config: Config,
    epochs: int,
    probes: Mapping[str, Shown],
) -> tuple[VisionTransformer, dict[str, object]]:
    """The student of `pool`, and by step how far it is from one in whose pool `others` replace the first images.

    `distance` is ‖θ - θ'‖₂, `way` how far the first student has come from the start, and `losses` by probe the mean
    |ℓ(θ, z) - ℓ(θ', z)|, which uniform stability bounds for the worst pool and the worst z.
    """
    config = replace(config, distill=replace(config.distill, rounds=1, epochs_per_round=epochs))
    student, twin = deepcopy(start), deepcopy(start)
    one = train(student, ensemble, pool, config, probes)
    other = train(twin, ensemble, join([others, behind(pool, len(others))]), config, probes)
    pairs = [(one[step], other[step]) for step in one]
    return student, {
        "steps": list(one),
        "distance": [(theta - another).norm().item() for (theta, _), (another, _) in pairs],
        "way": [(theta - one[0][0]).norm().item() for (theta, _), _ in pairs],
        "losses": {
            name: [(mine[name] - its[name]).abs().mean().item() for (_, mine), (_, its) in pairs] for name in probes
        },
    }
