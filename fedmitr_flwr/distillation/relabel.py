"""Token relabelling: which patches keep the pseudo-label, and what the ensemble says of the others.

Patches of high information density keep the class that was inverted; those of low density get the ensemble's soft
labels [P]. What "density" and "relabelled" mean exactly is our reading [M]; docs/fedmitr.md lists the readings.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import RelabelConfig
from ..ensemble.ensemble import Ensemble
from ..inversion.result import Inverted
from ..vit.tokens import patchify, take


@dataclass(frozen=True)
class View:
    """A way of looking at M synthetic images: J patches of each, with the labels of that look.

    Attributes:
        rows: (M,) the images looked at, as rows of the pool.
        given: (M, J) positions of the patches that the student and the teachers see.
        high: (M, J), True = the patch token keeps the pseudo-label; False = it has the ensemble's soft label, if any.
        hard: (M,), True = the class token is trained on the pseudo-label.
        scores: (M, Y) the ensemble's answer for the class token, given these patches.
        token_scores: (M, J, Y) its answers for the patch tokens.
        soft: what carries the soft labels of low density: `tokens` (R1) or `cls` (R2, the complement image).
    """

    rows: Tensor
    given: Tensor
    high: Tensor
    hard: Tensor
    scores: Tensor
    token_scores: Tensor
    soft: str

    def __len__(self) -> int:
        return len(self.rows)


def relabel(ensemble: Ensemble, inverted: Inverted, config: RelabelConfig, batch_size: int = 256) -> tuple[View, ...]:
    """The views of new synthetic images; a mode gives always the same number of views of the same J.

    - `none`: every patch keeps the pseudo-label.
    - `drop`: low-density patches are left out (SMI [C]).
    - `tokens`: low-density patch tokens get the ensemble's patch logits (R1).
    - `complement`: the low-density patches alone are an image of their own, whose class token gets the ensemble's
      answer (R2).
    """
    looks = _looks(inverted, config.mode)
    answers = [_ask(ensemble, inverted.images, rows, given, batch_size) for rows, given, _, _ in looks]
    return tuple(
        View(rows, given, high, high.any(1), *answer, soft)
        for (rows, given, high, soft), answer in zip(looks, answers, strict=True)
    )


def answered(view: View, images: Tensor, ensemble: Ensemble, batch_size: int = 256) -> View:
    """The view with the answers that the ensemble gives now; `images` are all that `view.rows` may name."""
    scores, token_scores = _ask(ensemble, images, view.rows, view.given, batch_size)
    return replace(view, scores=scores, token_scores=token_scores)


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


@torch.no_grad()
def _ask(ensemble: Ensemble, images: Tensor, rows: Tensor, given: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Answers of the class token (M, Y) and of the patch tokens (M, J, Y)."""
    answers = [
        ensemble.scores(take(patchify(images[chunk_rows], ensemble.patch), chunk), chunk)
        for chunk_rows, chunk in zip(rows.split(batch_size), given.split(batch_size), strict=True)
    ]
    scores, token_scores = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return scores, token_scores
