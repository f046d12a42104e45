"""Turn classes into images: `dense`, `sparse` (SMI) or `pri4` (patch rebirth)."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.compute import is_out_of_memory, whole_float32
from ..config import InversionConfig, ModelConfig
from ..config.sections import REBIRTHS
from ..data.images import value_range
from ..ensemble.ensemble import Ensemble
from ..vit.tokens import take
from .pool import Pool, join
from .starts import Start, leaves
from .trajectory import OnStep, Trajectory

log = logging.getLogger("fedmitr")

DROP = 0.3  # share of the alive patches that `sparse` halts at each stop, as SMI [C]
KEEP_EPSILON = 1e-9  # (1 - 0.8) · 10 must keep 2 patches, not 1.999... -> 1


class Pixels(NamedTuple):
    """What pixels start from, and Adam's rate for them."""

    start: Start
    lr: float


PIXELS = Pixels(leaves, 0.1)


def invert(
    ensemble: Ensemble,
    targets_B: Tensor,
    config: InversionConfig,
    model: ModelConfig,
    pixels: Pixels = PIXELS,
    *,
    flip: bool,
    rng: torch.Generator,
    on_step: OnStep | None = None,
) -> Pool:
    """Make images that the ensemble gives to the classes `targets_B`.

    Minimises CE(A(T(x)), y) + tv · TV₂(x) over the pixels of alive patches, from the images of `pixels.start`, with T
    a random flip (SMI, Hu et al. 2024 [C]; teacher replaced by the ensemble [I]). A batch that does not fit into memory
    is made in two halves, and so on.

    Returns:
        B images; for `pri4`, four times as many.
    """
    device = ensemble.weights.device
    low, high = (end.to(device) for end in value_range(model))
    modes = {"dense": _dense, "sparse": _sparse, "pri4": _rebirths}

    def attempt(starts: Tensor, targets: Tensor) -> Pool:
        run = Trajectory(ensemble, starts, targets, config, (low, high), flip, rng, pixels.lr, on_step)
        return modes[config.mode](run, config)

    starts = pixels.start(len(targets_B), model, rng).to(device)
    with whole_float32():
        return in_halves(attempt, starts, targets_B.to(device), rng)


def in_halves(attempt: Callable[[Tensor, Tensor], Pool], starts: Tensor, targets: Tensor, rng: torch.Generator) -> Pool:
    """`attempt(starts, targets)` on the whole batch, or, where that is too much for the memory, on each half of it."""
    state = rng.get_state()
    try:
        return attempt(starts, targets)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(targets) == 1:
            raise
    # Outside of `except`: while an error is handled, its traceback keeps the tensors alive.
    log.warning(
        "inversion: out of memory with %d images at once; going on with half as many (inversion.batch-size)",
        len(targets),
    )
    rng.set_state(state)
    half = len(targets) // 2
    parts = [(starts[:half], targets[:half]), (starts[half:], targets[half:])]
    return join([in_halves(attempt, *part, rng) for part in parts])


def halting_steps(config: InversionConfig) -> list[int]:
    """The steps of `sparse` at whose start patches are halted: fractions of T, at least one step apart."""
    steps: list[int] = []
    for fraction in config.stop_fractions:
        step = max(round(fraction * config.steps), steps[-1] + 1 if steps else 1)
        if step < config.steps:
            steps.append(step)
    return steps


def alive_counts(num_patches: int, config: InversionConfig) -> list[int]:
    """Patches alive before and after each stop of `sparse`: 196 -> 137 -> 95 -> 66 -> 46 in SMI's setting."""
    counts = [num_patches]
    for _ in halting_steps(config):
        counts.append(max(1, int(counts[-1] * (1 - DROP) + KEEP_EPSILON)))
    return counts


def _dense(run: Trajectory, config: InversionConfig) -> Pool:
    """Every patch to the end (F-ADI). Its dense patches are chosen afterwards, as many as `sparse` would keep."""
    loss_B = _run_best(run, config.steps)
    everything = run.positions_BK
    top = run.importance().topk(alive_counts(everything.shape[1], config)[-1]).indices
    dense = torch.zeros_like(everything, dtype=torch.bool).scatter(1, top, True)
    return run.pool(everything, dense, loss_B)


def _sparse(run: Trajectory, config: InversionConfig) -> Pool:
    """SMI: at each stop the least important alive patches are halted and dropped."""
    everything = run.positions_BK
    counts = alive_counts(everything.shape[1], config)[1:]
    for stop, count in zip(halting_steps(config), counts, strict=True):
        _run(run, stop)
        run.keep(run.importance().topk(count).indices)
    loss_B = _run_best(run, config.steps)
    return run.pool(everything, run.alive_mask(), loss_B)


def _rebirths(run: Trajectory, config: InversionConfig) -> Pool:
    """Patch rebirth (Heo & Choi 2025 [C]): v times, T/v steps, then the N/v best patches leave as a finished image.

    Detachment order grades the information density: patches of the earlier half of the images are `dense` [M]. Patches
    beyond v · ⌊N/v⌋ are in no image.
    """
    v, num_patches = REBIRTHS, run.positions_BK.shape[1]
    share = num_patches // v
    positions, alive, losses = [], [], []
    for rebirth in range(1, v + 1):
        loss_B = _run(run, rebirth * config.steps // v)
        order = run.importance().argsort(1, descending=True)
        finished = take(run.positions_BK, order[:, :share])
        positions.append(finished)
        alive.append(torch.zeros_like(run.alive_mask()).scatter(1, finished, True))
        losses.append(loss_B)
        if order.shape[1] > share:
            run.keep(order[:, share:])
        else:
            run.write(run.alive_BKE.detach())
    early = torch.arange(v, device=run.targets_B.device) < (v + 1) // 2
    return Pool(
        patches=run.canvas_BNE.repeat(v, 1, 1),
        positions=torch.cat(positions),
        dense=early.repeat_interleave(len(run.targets_B))[:, None].expand(-1, share).contiguous(),
        alive=torch.cat(alive),
        targets=run.targets_B.repeat(v),
        loss=torch.cat(losses),
        patch=run.patch,
    )


def _run(run: Trajectory, until: int) -> Tensor:
    """Plain steps until so many are done; the last one's losses (B,)."""
    loss_B = torch.full_like(run.targets_B, torch.inf, dtype=torch.float32)
    while run.done < until:
        loss_B, _ = run.step()
    return loss_B


def _run_best(run: Trajectory, until: int) -> Tensor:
    """Steps with a fixed alive set; settles on a copy of each image's best iterate and returns its loss."""
    best_B = torch.full_like(run.targets_B, torch.inf, dtype=torch.float32)
    best_BKE = run.alive_BKE.detach().clone()
    while run.done < until:
        loss_B, patches_BKE = run.step()
        better = loss_B < best_B
        best_B = torch.where(better, loss_B, best_B)
        best_BKE = torch.where(better[:, None, None], patches_BKE, best_BKE)
    run.settle(best_BKE)
    return best_B
