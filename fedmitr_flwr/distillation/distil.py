"""Train the student on the pool."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..client.train import shift_and_flip
from ..common.compute import ahead, side_by_side
from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..vit.optim import Stepper
from ..vit.tokens import TokenLogits, forward_tokens, patchify, roll_and_flip, take
from .ema import Ema
from .losses import Labels, Parts, distillation_loss
from .mix import Mixed, mix, thin
from .pool import Pool
from .relabel import View

OnBatch = Callable[[int, Parts], None]  # (images, loss parts), once per batch
# (ensemble, patches (B, J, E), positions (B, J), random stream) -> patches that student and teachers see instead
Perturb = Callable[[Ensemble, Tensor, Tensor, torch.Generator], Tensor]


def count_batches(views: Sequence[View], config: Config) -> int:
    """Batches of the whole distillation, if every epoch adds images like these `views`."""
    distill = config.distill
    return sum(
        distill.passes * -(-epoch * len(view) // distill.batch_size)
        for epoch in range(1, distill.epochs + 1)
        for view in views
    )


def distil(
    student: VisionTransformer,
    ensemble: Ensemble,
    pool: Pool,
    config: Config,
    stepper: Stepper,
    rng: torch.Generator,
    on_batch: OnBatch | None = None,
    ema: Ema | None = None,
    perturb: Perturb | None = None,
) -> None:
    """Pass over the pool `config.distill.passes` times, training `student` in place through `stepper`.

    `ema` takes in the weights after each step; the student itself keeps the last ones. With `perturb`, which changes
    each batch once more, teachers are to be asked again. On two CPU threads or more, half of them ask the teachers
    about the next batch while the others train the student on this one.
    """
    student.train()
    by_cpu = pool.images.device.type == "cpu"
    with side_by_side(2 if by_cpu else 1) as at_once:
        lessons = _lessons(ensemble, pool, config, rng, perturb)
        for lesson in ahead(lessons) if at_once == 2 else lessons:
            answers = forward_tokens(student, lesson.patches, lesson.positions)
            loss = distillation_loss(answers, lesson.labels, config.distill, config.relabel.temperature, ensemble.teach)
            if lesson.soft == "cls":  # R2: the class token carries the soft labels of low density
                loss = loss._replace(low=loss.kd, kd=torch.zeros_like(loss.kd))
            stepper.step(loss.total(config.distill))
            if ema:
                ema.update(student)
            if on_batch:
                on_batch(len(lesson.patches), loss)
    student.eval()


class _Lesson(NamedTuple):
    """A batch as the student sees it, and what it is to answer."""

    patches: Tensor  # (B, J, E)
    positions: Tensor  # (B, J)
    labels: list[Labels]
    soft: str  # who carries the soft labels, `View.soft`


def _lessons(
    ensemble: Ensemble, pool: Pool, config: Config, rng: torch.Generator, perturb: Perturb | None
) -> Iterator[_Lesson]:
    """All of one distillation. None depends on the student, so they may be made ahead of it."""
    for _ in range(config.distill.passes):
        for view, chosen in _batches(pool, config.distill.batch_size, rng):
            mixed = _augmented(pool, view, chosen, config, rng)
            if perturb:
                mixed = mixed._replace(patches=perturb(ensemble, mixed.patches, mixed.positions, rng))
            yield _Lesson(
                mixed.patches, mixed.positions, _labels(pool, view, chosen, mixed, config, ensemble), view.soft
            )


def _batches(pool: Pool, batch_size: int, rng: torch.Generator) -> list[tuple[View, Tensor]]:
    """One pass: every image of every view once, batches of all views in random order."""
    batches = [
        (view, chosen) for view in pool.views for chosen in torch.randperm(len(view), generator=rng).split(batch_size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=rng)]


def _augmented(pool: Pool, view: View, chosen: Tensor, config: Config, rng: torch.Generator) -> Mixed:
    """Patches and positions of the chosen images: mixed and, where the teachers see it too, moved, flipped, thinned.

    Cached answers are of the image as it was made; a rolled one may be of another class (a digit moved by a patch is).
    Shifts are by at most half a patch: most of what a token then shows is of its own patch, and so is its density.
    """
    model, again = config.model, config.distill.teachers == "again"
    chosen = chosen.to(pool.images.device)
    given, images = view.given[chosen], pool.images[view.rows[chosen]]
    if again and config.distill.shift:
        images = shift_and_flip(images, flip=False, rng=rng, most=model.patch_size // 2)
    mixed = mix(take(patchify(images, model.patch_size), given), given, config.distill.mix, rng)
    if not again:
        return mixed
    patches, positions = roll_and_flip(
        mixed.patches,
        mixed.positions,
        grid=model.grid,
        patch=model.patch_size,
        roll=config.inversion.roll,
        flip=config.data.flip,
        rng=rng,
    )
    most = max(1, round(config.distill.keep * model.num_patches))
    return thin(mixed._replace(patches=patches, positions=positions), most, rng)


def _labels(pool: Pool, view: View, chosen: Tensor, mixed: Mixed, config: Config, ensemble: Ensemble) -> list[Labels]:
    """Labels of the chosen images and, where mixed, of their partners."""
    chosen = chosen.to(pool.images.device)
    answers: TokenLogits | None = None
    if config.distill.teachers == "again":
        with torch.no_grad():
            answers = ensemble.scores(mixed.patches, mixed.positions)
    labels = [_labels_of(pool, view, chosen, mixed.kept, mixed.share, mixed.token_share, answers)]
    if config.distill.mix != "none":
        partners = chosen[mixed.partner]
        labels.append(_labels_of(pool, view, partners, mixed.kept, 1 - mixed.share, 1 - mixed.token_share, answers))
    return labels


def _labels_of(
    pool: Pool,
    view: View,
    chosen: Tensor,
    kept_BJ: Tensor,
    share_B: Tensor,
    share_BJ: Tensor,
    answers: TokenLogits | None,
) -> Labels:
    high = take(view.high[chosen], kept_BJ).float()
    low = 1 - high if view.soft == "tokens" else torch.zeros_like(high)
    return Labels(
        targets=pool.targets[view.rows[chosen]],
        hard=share_B * view.hard[chosen],
        high=share_BJ * high,
        low=share_BJ * low,
        share=share_B,
        scores=view.scores[chosen] if answers is None else answers.cls,
        token_scores=take(view.token_scores[chosen], kept_BJ) if answers is None else answers.patches,
    )
