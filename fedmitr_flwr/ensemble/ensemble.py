"""The one definition of "the ensemble": teachers, their weights, and how their answers are combined.

Shapes: K teachers, B images, M given patches, E numbers in a patch, Y classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..common import outside
from ..common.errors import ConfigError
from ..config import EnsembleConfig, ModelConfig
from ..config.sections import CONTRAST
from ..uploads.upload import Upload
from ..vit.tokens import Question, TokenLogits, all_positions, forward_cls, forward_tokens, patchify
from .contrast import Contrast
from .routing import Routing, everyone
from .teachers import Teachers

# Of each teacher's softmax, in `probs` and in importance: at 1, teachers that are all but certain differ by less than
# their weights do (docs/LOG.md).
TEMPERATURE = 3.0

Loss = Callable[[Tensor, Tensor], Tensor]  # (scores (B, Y), patches (B, M, E)) -> (B,)


class Ensemble(nn.Module):
    """Frozen teachers. `softmax` of its scores is the ensemble's distribution, whichever way answers are combined.

    It answers in two roles: it decides what an image is (`forward`, `slope`), and it teaches a student (`scores`).
    """

    def __init__(
        self,
        teachers: Teachers | Sequence[VisionTransformer],
        weights_KY: Tensor,
        combine: str,
        teach: str = "logits",
    ) -> None:
        """`combine` is how answers are combined to decide, `teach` how to teach: likewise, or by `contrast`."""
        super().__init__()
        self.teachers = teachers if isinstance(teachers, Teachers) else Teachers(teachers)
        self.patch: int = self.teachers[0].patch_embed.patch_size[0]  # pixels along a patch's side
        self.grid: int = self.teachers[0].patch_embed.grid_size[0]  # patches along an image's side
        self.weights: Tensor
        self.register_buffer("weights", weights_KY)
        self.combine, self.teach = combine, teach

    @classmethod
    def of(
        cls,
        uploads: Sequence[Upload],
        model: ModelConfig,
        config: EnsembleConfig,
        teach: str = "logits",
    ) -> "Ensemble":
        weights_KY = teacher_weights(uploads, model.num_classes, config.weights)
        return cls(Teachers.of(uploads, model), weights_KY, config.combine, teach)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Scores (B, Y) of whole images."""
        return combine_answers(self._logits(images_BCHW), self.weights, self.combine)

    @torch.no_grad()
    def answers(self, images_MCHW: Tensor, batch_size: int = 256) -> Tensor:
        """Each teacher's own logits on each whole image: (K, M, Y)."""
        return torch.cat([self._logits(images) for images in images_MCHW.split(batch_size)], dim=1)

    def probabilities(self, images_MCHW: Tensor) -> Tensor:
        """Each teacher's own distribution on each whole image, at temperature 1: (K, M, Y)."""
        return self.answers(images_MCHW).softmax(-1)

    @torch.no_grad()
    def scores(self, patches_BME: Tensor, positions_BM: Tensor) -> TokenLogits:
        """What the ensemble teaches: scores of the class token (B, Y) and of each given patch (B, M, Y)."""
        teach = Contrast(self.weights) if self.teach == CONTRAST else Weighted(rule(self.teach), self.weights)
        answers = self._ask(forward_tokens, patches_BME, positions_BM, everyone(self.weights))
        parts = (  # made one by one: all teachers' answers together may not fit into memory
            TokenLogits(teach.part(k, cls), teach.part(k, patches)) for k, (cls, patches) in enumerate(answers)
        )
        total = reduce(lambda some, part: TokenLogits(*map(teach.join, some, part)), parts)
        return TokenLogits(*map(teach.scores, total))

    @property
    def by_many(self) -> bool:
        """Whether threads may ask it at the same time: one's guest or stacked weights would be another's teacher."""
        return not _stacks(self.weights) and not self.teachers.streamed

    def slope(self, loss: Loss, patches_BME: Tensor, positions_BM: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """`loss(scores (B, Y), patches)` of each image (B,), and its gradient by the patches (B, M, E).

        Teachers that do not fit into memory, or whose graphs do not, are run twice: for their answers, and, once it is
        known how the loss depends on each answer, one by one for the gradient, with one such graph at a time.
        """
        leaf_BME = patches_BME.detach().requires_grad_()
        together, room = self.teachers.keep_graphs(patches_BME), self.teachers.graphs(patches_BME)
        asked: list[Tensor] = []
        answers = self._ask(forward_cls, leaf_BME, positions_BM, routing)
        for k in routing.rows:
            with torch.set_grad_enabled(together or k < room):
                asked.append(next(answers)[0])
        logits = [answer.detach().requires_grad_() for answer in asked]
        answers_KBY = self._spread(logits, routing, len(leaf_BME))
        scores_BY = combine_answers(answers_KBY, routing.weights, self.combine)
        loss_B = loss(scores_BY, leaf_BME)
        *slopes, direct = torch.autograd.grad(loss_B.sum(), [*logits, leaf_BME], allow_unused=True)
        gradient_BME = torch.zeros_like(leaf_BME) if direct is None else direct
        if together:
            gradient_BME += torch.autograd.grad(asked, leaf_BME, slopes)[0]
        else:
            for (k, rows), answer, slope in zip(routing.rows.items(), asked, slopes, strict=True):
                kept = k < room
                again = answer if kept else forward_cls(self.teachers[k], leaf_BME[rows], positions_BM[rows])[0]
                gradient_BME += torch.autograd.grad(again, leaf_BME, slope)[0]
        return loss_B.detach(), gradient_BME

    @torch.no_grad()
    def importance(
        self, patches_BME: Tensor, positions_BM: Tensor, targets_B: Tensor, routing: Routing | None = None
    ) -> Tensor:
        """Importance (B, M) of each given patch: [CLS] attention, mean over teachers by confidence on the target [M].

        A teacher that never saw the class attends to noise; its confidence on the target keeps it out.
        """
        routing = routing or everyone(self.weights)
        total_BM = torch.zeros(positions_BM.shape, device=positions_BM.device)
        confidence_B = total_BM.new_zeros(len(targets_B))
        answers = self._ask(forward_cls, patches_BME, positions_BM, routing)
        for (k, rows), answer in zip(routing.rows.items(), answers, strict=True):
            weights_RY = routing.weights[k].expand(len(targets_B), -1)[rows]
            weighted_RY = weights_RY * (answer[0] / TEMPERATURE).softmax(-1)
            sure_R = weighted_RY.gather(1, targets_B[rows, None]).squeeze(1)
            total_BM[rows] += sure_R[:, None] * answer[1]
            confidence_B[rows] += sure_R
        return total_BM / confidence_B.clamp_min(1e-30)[:, None]

    def _logits(self, images_BCHW: Tensor) -> Tensor:
        """Each teacher's own, on whole images: (K, B, Y)."""
        patches = patchify(images_BCHW, self.patch)
        answers = self._ask(forward_cls, patches, all_positions(patches), everyone(self.weights))
        return torch.stack([logits for logits, _ in answers])

    def _ask(
        self, question: Question, patches_BME: Tensor, positions_BM: Tensor, routing: Routing
    ) -> Iterator[tuple[Tensor, ...]]:
        """The answer of each teacher that is asked anything, for the images that it is asked about."""
        if _stacks(patches_BME) and routing.share == 1 and self.teachers.keep_graphs(patches_BME):
            yield from zip(*self.teachers.ask_stacked(question, patches_BME, positions_BM), strict=True)
        else:
            for k, rows in routing.rows.items():
                yield question(self.teachers[k], patches_BME[rows], positions_BM[rows])

    def _spread(self, logits: list[Tensor], routing: Routing, batch: int) -> Tensor:
        """(K, B, Y): zeros, which have weight 0, where a teacher was not asked."""
        none_BY = logits[0].new_zeros(batch, logits[0].shape[1])
        spread = [none_BY] * len(self.teachers)
        for (k, rows), answer in zip(routing.rows.items(), logits, strict=True):
            # Not into one tensor (K, B, Y): its gradient would be copied as a whole for each teacher.
            spread[k] = answer if isinstance(rows, slice) else none_BY.index_copy(0, rows, answer)
        return torch.stack(spread)


def _stacks(tensor: Tensor) -> bool:
    """Whether all teachers run as one batched network: of the kernels of one teacher, a GPU is not busy."""
    return tensor.is_cuda


def combine_answers(logits_K: Tensor, weights_K: Tensor, combine: str) -> Tensor:
    """Combine teachers' logits z (K, ..., Y) into scores (..., Y) with weights w that sum to 1 over K.

    `logits`: Σ w z. `probs`: log Σ w p, the mixture, with p the softmax of z / `TEMPERATURE`.
    The weights are (K, Y), or (K, B or 1, Y) where each image has its own.
    """
    middle = logits_K.dim() - weights_K.dim()
    weights = weights_K.reshape(*weights_K.shape[:-1], *[1] * middle, weights_K.shape[-1])
    how = rule(combine)
    return how.total(how.part(logits_K, weights))


class Rule(NamedTuple):
    """How teachers' logits become scores, one teacher after the other.

    A file that is named as `ensemble.combine` has the functions `part` and `join`.
    """

    part: Callable[[Tensor, Tensor], Tensor]  # (logits (..., Y), weights to broadcast to it) -> what one teacher adds
    join: Callable[[Tensor, Tensor], Tensor]  # (what some add, what one more adds) -> what they add, in whatever order
    total: Callable[[Tensor], Tensor]  # (what each adds (K, ...)) -> what they add together


def log_probabilities(logits: Tensor) -> Tensor:
    """Of a teacher, as they enter the mixture."""
    return (logits / TEMPERATURE).log_softmax(-1)


RULES: Mapping[str, Rule] = {
    "logits": Rule(torch.mul, torch.add, partial(torch.sum, dim=0)),
    "probs": Rule(
        lambda logits, weights: log_probabilities(logits) + weights.log(),
        torch.logaddexp,
        partial(torch.logsumexp, dim=0),
    ),
}


class Weighted(NamedTuple):
    """A rule with the teachers' weights, as `Contrast` is used."""

    rule: Rule
    weights_KY: Tensor

    def part(self, k: int, logits: Tensor) -> Tensor:
        """What teacher k adds."""
        return self.rule.part(logits, self.weights_KY[k])

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """What two add together."""
        return self.rule.join(one, other)

    def scores(self, parts: Tensor) -> Tensor:
        """What all add are the scores."""
        return parts


def rule(name: str) -> Rule:
    """Of `RULES`, or from outside the package."""
    if name in RULES:
        return RULES[name]
    module = outside.load(name, "rules", "ensemble.combine")
    for wanted in ("part", "join"):
        if not callable(getattr(module, wanted, None)):
            raise ConfigError(f"ensemble.combine = {name!r} has no function {wanted}; write part and join")
    return Rule(module.part, module.join, lambda parts_K: reduce(module.join, parts_K))


def teacher_weights(uploads: Sequence[Upload], num_classes: int, weights: str) -> Tensor:
    """The weight (K, Y) of each teacher for each class; each column sums to 1.

    `uniform`; `size`: by number of images; `counts`: by number of images of the class (a class without images is
    weighted by size); `estimated`: by size, until there are images (`scout.Weigher`).
    """
    sizes_K1 = torch.tensor([float(upload.num_examples) for upload in uploads])[:, None]
    if weights == "uniform":
        raw = torch.ones(len(uploads), num_classes)
    elif weights in ("size", "estimated"):
        raw = sizes_K1.expand(-1, num_classes)
    else:
        counts = torch.tensor([upload.class_counts for upload in uploads], dtype=torch.float32)
        raw = torch.where(counts.sum(0) > 0, counts, sizes_K1)
    return raw / raw.sum(0)
