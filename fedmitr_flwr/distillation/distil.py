"""Train the student on the pool."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..common.compute import ahead, side_by_side
from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..vit.optim import Stepper
from ..vit.tokens import TokenLogits, forward_tokens, patchify, random_flip, take
from .losses import Labels, Parts, distillation_loss, plain_loss
from .mix import Mixed, mix, thin
from .pool import Pool
from .relabel import View

BATCH = 64  # images that a step of the student sees
KEEP = 0.5  # a batch shows at most this share of an image's patches, drawn anew each time

OnBatch = Callable[[int, Parts], None]  # (images, loss parts), once per batch
# (ensemble, patches (B, J, E), positions (B, J), random stream) -> patches that student and teachers see instead
Perturb = Callable[[Ensemble, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Plain:
    """Distillation as the rivals have it: nothing is mixed, thinned or relabelled, and the class token alone learns.

    Attributes:
        temperature: T of `losses.plain_loss`.
        perturb: what is done to a batch of patches before anyone sees it; None: nothing.
    """

    temperature: float
    perturb: Perturb | None = None


def student_stepper(student: VisionTransformer, config: Config, total_steps: int) -> Stepper:
    return Stepper(student.parameters(), "muon", config.distill.lr, total_steps)


def count_batches(views: Sequence[View], config: Config) -> int:
    """Batches of the whole distillation, if every epoch adds images like these `views`."""
    distill = config.distill
    return sum(
        distill.epochs_per_round * -(-epoch * len(view) // BATCH)
        for epoch in range(1, distill.rounds + 1)
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
    plain: Plain | None = None,
) -> None:
    """Pass over the pool `config.distill.epochs_per_round` times, training `student` in place through `stepper`.

    Teachers are asked on each batch as the student sees it; with `plain`, that is all there is. On two CPU threads or
    more, half of them ask the teachers about the next batch while the others train the student on this one.
    """
    student.train()
    by_cpu = pool.images.device.type == "cpu"
    with side_by_side(2 if by_cpu else 1) as at_once:
        lessons = _lessons(ensemble, pool, config, rng, plain)
        for lesson in ahead(lessons) if at_once == 2 else lessons:
            answers = forward_tokens(student, lesson.patches, lesson.positions)
            if plain:
                loss = plain_loss(answers, lesson.scores.cls, plain.temperature)
            else:
                loss = distillation_loss(answers, lesson.labels, ensemble.teach)
            if lesson.soft == "cls":  # R2: the class token carries the soft labels of low density
                loss = loss._replace(low=loss.kd, kd=torch.zeros_like(loss.kd))
            stepper.step(loss.total())
            if on_batch:
                on_batch(len(lesson.patches), loss)
    student.eval()


class _Lesson(NamedTuple):
    """A batch as the student sees it, and what it is to answer."""

    patches: Tensor  # (B, J, E)
    positions: Tensor  # (B, J)
    scores: TokenLogits  # the ensemble's answers
    labels: list[Labels]  # of each of the mixed images; plain ones have none
    soft: str  # who carries the soft labels, `View.soft`


def _lessons(
    ensemble: Ensemble, pool: Pool, config: Config, rng: torch.Generator, plain: Plain | None
) -> Iterator[_Lesson]:
    """All of one distillation. None depends on the student, so they may be made ahead of it."""
    for _ in range(config.distill.epochs_per_round):
        for view, chosen in _batches(pool, rng):
            yield _lesson(ensemble, pool, view, chosen.to(pool.images.device), config, rng, plain)


def _batches(pool: Pool, rng: torch.Generator) -> list[tuple[View, Tensor]]:
    """One pass: every image of every view once, batches of all views in random order."""
    batches = [
        (view, chosen) for view in pool.views for chosen in torch.randperm(len(view), generator=rng).split(BATCH)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=rng)]


def _lesson(
    ensemble: Ensemble,
    pool: Pool,
    view: View,
    chosen: Tensor,
    config: Config,
    rng: torch.Generator,
    plain: Plain | None,
) -> _Lesson:
    """The chosen images: mixed, flipped and thinned, or, if `plain`, flipped and perhaps perturbed."""
    model = config.model
    given = view.given[chosen]
    patches = take(patchify(pool.images[view.rows[chosen]], model.patch_size), given)
    mixed = None if plain else mix(patches, given, rng)
    if mixed:
        patches, given = mixed.patches, mixed.positions
    if config.data.flip:
        patches, given = random_flip(patches, given, model.grid, model.patch_size, rng)
    if mixed:
        most = max(1, round(KEEP * model.num_patches))
        mixed = thin(mixed._replace(patches=patches, positions=given), most, rng)
        patches, given = mixed.patches, mixed.positions
    if plain and plain.perturb:
        patches = plain.perturb(ensemble, patches, given, rng)
    with torch.no_grad():
        scores = ensemble.scores(patches, given)
    return _Lesson(patches, given, scores, _labels(pool, view, chosen, mixed, scores) if mixed else [], view.soft)


def _labels(pool: Pool, view: View, chosen: Tensor, mixed: Mixed, scores: TokenLogits) -> list[Labels]:
    """Labels of the chosen images and of their partners."""
    partners = chosen[mixed.partner]
    return [
        _labels_of(pool, view, chosen, mixed.kept, mixed.share, mixed.token_share, scores),
        _labels_of(pool, view, partners, mixed.kept, 1 - mixed.share, 1 - mixed.token_share, scores),
    ]


def _labels_of(
    pool: Pool,
    view: View,
    chosen: Tensor,
    kept_BJ: Tensor,
    share_B: Tensor,
    share_BJ: Tensor,
    scores: TokenLogits,
) -> Labels:
    high = take(view.high[chosen], kept_BJ).float()
    low = 1 - high if view.soft == "tokens" else torch.zeros_like(high)
    return Labels(
        targets=pool.targets[view.rows[chosen]],
        hard=share_B * view.hard[chosen],
        high=share_BJ * high,
        low=share_BJ * low,
        share=share_B,
        scores=scores.cls,
        token_scores=scores.patches,
    )
