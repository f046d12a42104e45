"""Token relabelling: which patches keep the pseudo-label, and which get the ensemble's soft labels.

Patches of high information density keep the class that was inverted; those of low density get the ensemble's soft
labels [P], which distillation asks for on each batch. What "density" and "relabelled" mean exactly is our reading [M];
docs/fedmitr.md lists the readings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import RelabelConfig
from ..inversion.result import Inverted


@dataclass(frozen=True)
class View:
    """A way of looking at M synthetic images: J patches of each, with the labels of that look.

    Attributes:
        rows: (M,) the images looked at, as rows of the pool.
        given: (M, J) positions of the patches that the student and the teachers see.
        high: (M, J), True = the patch token keeps the pseudo-label; False = it has the ensemble's soft label, if any.
        hard: (M,), True = the class token is trained on the pseudo-label.
        soft: what carries the soft labels of low density: `tokens` (R1) or `cls` (R2, the complement image).
    """

    rows: Tensor
    given: Tensor
    high: Tensor
    hard: Tensor
    soft: str

    def __len__(self) -> int:
        return len(self.rows)


def relabel(inverted: Inverted, config: RelabelConfig) -> tuple[View, ...]:
    """The views of new synthetic images; a mode gives always the same number of views of the same J.

    - `none`: every patch keeps the pseudo-label.
    - `drop`: low-density patches are left out (SMI [C]).
    - `tokens`: low-density patch tokens get the ensemble's answers of patch tokens (R1).
    - `complement`: the low-density patches alone are an image of their own, whose class token gets the ensemble's
      answer (R2).
    """
    return tuple(
        View(rows, given, high, high.any(1), soft) for rows, given, high, soft in _looks(inverted, config.mode)
    )


def _looks(inverted: Inverted, mode: str) -> list[tuple[Tensor, Tensor, Tensor, str]]:
    """(rows, given, high, soft) of each view."""
    rows = torch.arange(len(inverted), device=inverted.given.device)
    given, high = inverted.given, inverted.high
    if mode == "none":
        return [(rows, given, torch.ones_like(high), "tokens")]
    if mode == "tokens":
        return [(rows, given, high, "tokens")]
    dense_rows, dense = _select(rows, given, high)
    views = [(dense_rows, dense, torch.ones_like(dense, dtype=torch.bool), "tokens")]
    if mode == "complement" and not high.all():
        other_rows, others = _select(rows, given, ~high)
        views.append((other_rows, others, torch.zeros_like(others, dtype=torch.bool), "cls"))
    return views


def _select(rows: Tensor, given_MJ: Tensor, wanted_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """The images with any wanted patch, and the positions of those patches, of which each such image has as many."""
    some = wanted_MJ.any(1)
    counts = wanted_MJ[some].sum(1)
    assert (counts == counts[0]).all(), "images of one inversion keep equally many patches"
    return rows[some], given_MJ[some][wanted_MJ[some]].reshape(int(some.sum()), -1)
