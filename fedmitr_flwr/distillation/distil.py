"""Train the student on the pool.

Shapes: B images in a batch, J patches of each that are seen, E numbers in a patch, N patches in an image, Y classes.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..common.compute import side_by_side
from ..common.workers import Report, Threads, Workers, silent
from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool
from ..vit.optim import Stepper
from ..vit.tokens import TokenLogits, forward_tokens, random_flip, take
from .losses import Labels, Parts, distillation_loss, plain_loss

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


class Question(NamedTuple):
    """A batch as teachers and student see it."""

    patches: Tensor  # (B, J, E)
    positions: Tensor  # (B, J)
    labels: tuple[Labels, ...] = ()  # of the two images in each row; none of an image that is not mixed


def student_stepper(student: VisionTransformer, config: Config, total_steps: int) -> Stepper:
    return Stepper(student.parameters(), "muon", config.distill.lr, total_steps)


def count_batches(images: int, config: Config) -> int:
    """Batches of the whole distillation, if every round adds so many images."""
    rounds = range(1, config.distill.rounds + 1)
    return config.distill.epochs_per_round * sum(-(-r * images // BATCH) for r in rounds)


def distil(
    student: VisionTransformer,
    ensemble: Ensemble,
    pool: Pool,
    config: Config,
    stepper: Stepper,
    rng: torch.Generator,
    on_batch: OnBatch | None = None,
    plain: Plain | None = None,
    workers: Workers | None = None,
) -> None:
    """Train `student` in place through `stepper`, for `config.distill.epochs_per_round` epochs over the pool.

    On two CPU threads or more, half of them ask the teachers about the next batch while the others train the student;
    where there are `workers`, these ask about the next ones.
    """
    student.train()
    by_cpu = pool.patches.device.type == "cpu"
    made = questions(ensemble, pool, config, rng, plain)
    with (
        side_by_side(2 if by_cpu else 1) as at_once,
        closing((workers or Threads()).in_order(partial(ask, ensemble), made, at_once)) as asked,
    ):
        for question, soft in asked:
            answers = forward_tokens(student, question.patches, question.positions)
            if plain:
                loss = plain_loss(answers, soft, plain.temperature)
            else:
                loss = distillation_loss(answers, soft, question.labels, ensemble.teach)
            stepper.step(loss.total())
            if on_batch:
                on_batch(len(question.patches), loss)
    student.eval()


def ask(ensemble: Ensemble, question: Question, _: Report = silent) -> TokenLogits:
    return ensemble.scores(question.patches, question.positions)


def questions(
    ensemble: Ensemble, pool: Pool, config: Config, rng: torch.Generator, plain: Plain | None = None
) -> Iterator[Question]:
    """Every image once per epoch, in random batches. None depends on the student: they may be made ahead of it."""
    for _ in range(config.distill.epochs_per_round):
        batches = torch.randperm(len(pool), generator=rng).split(BATCH)
        for b in torch.randperm(len(batches), generator=rng).tolist():
            chosen = batches[b].to(pool.patches.device)
            if plain:
                yield whole_images(ensemble, pool, chosen, config, rng, plain.perturb)
            else:
                yield mixed_images(pool, chosen, config, rng)


def mixed_images(pool: Pool, first_B: Tensor, config: Config, rng: torch.Generator) -> Question:
    """Mix each image with another one of the batch, flip, leave out patches.

    Each token is of the one or the other image, with its position, in a share λ ~ U(0, 1) (MixToken, Jiang et al.
    2021 [C]). Of the N patches `KEEP` are seen at most: the same tokens in ever new company are a cheap source of
    diversity [M].
    """
    model, device = config.model, first_B.device
    second_B = first_B[torch.randperm(len(first_B), generator=rng).to(device)]
    share_B1 = torch.rand(len(first_B), 1, generator=rng).to(device)
    own_BJ = torch.rand(pool.positions[first_B].shape, generator=rng).to(device) < share_B1
    patches = torch.where(own_BJ[..., None], seen(pool, first_B), seen(pool, second_B))
    positions = torch.where(own_BJ, pool.positions[first_B], pool.positions[second_B])
    dense = [pool.dense[images].float() for images in (first_B, second_B)]
    own = own_BJ.float()
    if config.data.flips:
        patches, positions = random_flip(patches, positions, model.grid, model.patch_size, rng)
    most = max(1, round(KEEP * model.num_patches))
    if most < positions.shape[1]:
        ids_keep = torch.rand(positions.shape, generator=rng).topk(most).indices.to(device)
        patches, positions, own, *dense = (take(each, ids_keep) for each in (patches, positions, own, *dense))
    share = own.mean(1)
    return Question(
        patches,
        positions,
        (
            Labels(pool.targets[first_B], pool.dense[first_B].any(1), share, own, dense[0]),
            Labels(pool.targets[second_B], pool.dense[second_B].any(1), 1 - share, 1 - own, dense[1]),
        ),
    )


def whole_images(
    ensemble: Ensemble, pool: Pool, chosen_B: Tensor, config: Config, rng: torch.Generator, perturb: Perturb | None
) -> Question:
    """The images as they are, flipped and perhaps perturbed."""
    patches, positions = seen(pool, chosen_B), pool.positions[chosen_B]
    if config.data.flips:
        patches, positions = random_flip(patches, positions, config.model.grid, config.model.patch_size, rng)
    if perturb:
        patches = perturb(ensemble, patches, positions, rng)
    return Question(patches, positions)


def seen(pool: Pool, chosen_B: Tensor) -> Tensor:
    """The patches (B, J, E) at the chosen images' `positions`."""
    return take(pool.patches[chosen_B], pool.positions[chosen_B])
