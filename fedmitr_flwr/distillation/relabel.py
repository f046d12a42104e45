"""Token relabelling: which patches keep the pseudo-label, and which get the ensemble's soft labels.

Patches of high information density keep the class that was inverted; those of low density get the ensemble's soft
labels [P], which distillation asks for on each batch (`losses.distillation_loss`). What "density" and "relabelled" mean
exactly is our reading [M]; docs/fedmitr.md lists the readings.
"""

from dataclasses import replace

import torch

from ..inversion.pool import Pool


def relabel(pool: Pool, mode: str) -> Pool:
    """New synthetic images with the labels of their patches decided, by `relabel.mode`.

    - `tokens`: dense patches keep the pseudo-label, the others get soft labels.
    - `none`: every patch keeps the pseudo-label.
    - `drop`: dense patches keep the pseudo-label, the others are left out (SMI [C]), and so are images without any.
    """
    if mode == "none":
        return replace(pool, dense=torch.ones_like(pool.dense))
    if mode == "drop":
        pool = pool.rows(pool.dense.any(1))
        seen = pool.positions[pool.dense].reshape(len(pool), -1)  # images of one inversion have equally many
        return replace(pool, positions=seen, dense=torch.ones_like(seen, dtype=torch.bool))
    return pool
