"""The one definition of "the ensemble": teachers, their weights, and how their answers are combined.

Shapes: K teachers, B images, M given patches, Y classes.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import EnsembleConfig, ModelConfig
from ..training.upload import Upload
from .build import build_vit
from .tokens import TokenLogits, all_positions, cls_attention, forward_tokens, patchify


class Ensemble(nn.Module):
    """Frozen teachers. `softmax` of its scores is the ensemble's distribution, whichever way answers are combined."""

    def __init__(self, teachers: Sequence[VisionTransformer], weights_KY: Tensor, combine: str) -> None:
        super().__init__()
        self.patch: int = teachers[0].patch_embed.patch_size[0]  # pixels along a patch's side
        self.grid: int = teachers[0].patch_embed.grid_size[0]  # patches along an image's side
        self.teachers = nn.ModuleList(teachers).requires_grad_(False).eval()
        self.weights: Tensor
        self.register_buffer("weights", weights_KY)
        self.combine = combine

    @classmethod
    def of(cls, uploads: Sequence[Upload], model: ModelConfig, config: EnsembleConfig) -> "Ensemble":
        teachers = []
        for upload in uploads:
            teacher = build_vit(model)
            teacher.load_state_dict(upload.weights)
            teachers.append(teacher)
        return cls(teachers, teacher_weights(uploads, model.num_classes, config.weights), config.combine)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Scores (B, Y) of whole images."""
        patches = patchify(images_BCHW, self.patch)
        return self.scores(patches, all_positions(patches)).cls

    def scores(self, patches_BME: Tensor, positions_BM: Tensor) -> TokenLogits:
        """Scores of the class token (B, Y) and of each given patch (B, M, Y)."""
        answers = [forward_tokens(teacher, patches_BME, positions_BM) for teacher in self.teachers]
        return TokenLogits(
            combine_answers(torch.stack([answer.cls for answer in answers]), self.weights, self.combine),
            combine_answers(torch.stack([answer.patches for answer in answers]), self.weights, self.combine),
        )

    @torch.no_grad()
    def importance(self, patches_BME: Tensor, positions_BM: Tensor, targets_B: Tensor) -> Tensor:
        """Importance (B, M) of each given patch: [CLS] attention, mean over teachers by confidence on the target [M].

        A teacher that never saw the class attends to noise; its confidence on the target keeps it out.
        """
        total: Tensor | float = 0.0
        confidence: Tensor | float = 0.0
        for teacher, weights_Y in zip(self.teachers, self.weights, strict=True):
            logits, attention_BM = cls_attention(teacher, patches_BME, positions_BM)
            sure_B = weights_Y[targets_B] * logits.softmax(-1).gather(1, targets_B[:, None]).squeeze(1)
            total, confidence = total + sure_B[:, None] * attention_BM, confidence + sure_B[:, None]
        return total / torch.as_tensor(confidence).clamp_min(1e-30)


def combine_answers(logits_K: Tensor, weights_KY: Tensor, combine: str) -> Tensor:
    """Combine teachers' logits (K, ..., Y) into scores (..., Y) with weights (K, Y) that sum to 1 over K.

    `logits`: Σ w z. `logp`: Σ w log p, a weighted geometric mean. `probs`: log Σ w p, the mixture.
    """
    weights = weights_KY.reshape(len(weights_KY), *[1] * (logits_K.dim() - 2), -1)
    if combine == "logits":
        return (weights * logits_K).sum(0)
    if combine == "logp":
        return (weights * logits_K.log_softmax(-1)).sum(0)
    return (logits_K.log_softmax(-1) + weights.log()).logsumexp(0)


def teacher_weights(uploads: Sequence[Upload], num_classes: int, weights: str) -> Tensor:
    """The weight (K, Y) of each teacher for each class; each column sums to 1.

    `uniform`; `size`: by number of images; `counts`: by number of images of the class (a class that nobody has is
    weighted by size).
    """
    sizes_K1 = torch.tensor([float(upload.num_examples) for upload in uploads])[:, None]
    if weights == "uniform":
        raw = torch.ones(len(uploads), num_classes)
    elif weights == "size":
        raw = sizes_K1.expand(-1, num_classes)
    else:
        counts = torch.tensor([upload.class_counts for upload in uploads], dtype=torch.float32)
        raw = torch.where(counts.sum(0) > 0, counts, sizes_K1)
    return raw / raw.sum(0)
