"""Inversion's arithmetic on paper: FLOPs of a ViT on some of its patches, and how much faster a mode can be at best.

Only matrix products are counted, at 2 FLOPs for each multiply-accumulate (MAC). The teachers are frozen: the backward
pass goes to the pixels and makes no gradient of a weight.
Letters: N patches, n tokens (prefix tokens and alive patches), L blocks, D width, A = heads · head width, E numbers in
a patch, Y classes, B images, v rebirths.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fedmitr_flwr.config import Config
from fedmitr_flwr.inversion.invert import alive_counts, halting_steps


class Stage(NamedTuple):
    """Optimisation steps with one number of alive patches."""

    steps: int
    alive: int


@dataclass(frozen=True)
class Shape:
    """What the matrix products of a ViT depend on."""

    depth: int  # L
    width: int  # D
    attention: int  # A
    mlp: int  # MACs of one block's MLP on one token
    patch: int  # E
    prefix: int  # [CLS] and registers
    classes: int  # Y

    @classmethod
    def of(cls, vit: VisionTransformer) -> Self:
        """Read from a timm model; all its blocks are alike."""
        block, projection = vit.blocks[0], vit.patch_embed.proj
        return cls(
            depth=len(vit.blocks),
            width=vit.embed_dim,
            attention=block.attn.attn_dim,
            mlp=sum(layer.weight.numel() for layer in block.mlp.modules() if isinstance(layer, nn.Linear)),
            patch=projection.weight[0].numel(),
            prefix=vit.num_prefix_tokens,
            classes=vit.num_classes,
        )

    def linear_macs(self, alive: int) -> int:
        """Layers with weights, forward, one image: patch embedding, qkv, projection, MLP, and the head on [CLS].

        In the last block only [CLS] has a query, a projection and an MLP: no logits of the `alive` patches are wanted.
        """
        tokens = self.prefix + alive
        square = self.width * self.attention
        block = tokens * (4 * square + self.mlp)
        last = tokens * 2 * square + 2 * square + self.mlp
        return alive * self.patch * self.width + (self.depth - 1) * block + last + self.width * self.classes

    def attention_macs(self, alive: int) -> int:
        """QKᵀ and its product with V, forward, one image."""
        tokens = self.prefix + alive
        queries = (self.depth - 1) * tokens + 1
        return 2 * queries * tokens * self.attention

    def step_flops(self, alive: int) -> int:
        """Forward and backward to the pixels, one image.

        Backward, a layer with weights costs what it costs forward, a product of two activations twice that.
        """
        return 2 * (2 * self.linear_macs(alive) + 3 * self.attention_macs(alive))

    def run_flops(self, stages: Sequence[Stage]) -> int:
        """All optimisation steps of one image and one teacher; the passes that measure importance are not counted."""
        return sum(stage.steps * self.step_flops(stage.alive) for stage in stages)


def stages(config: Config) -> list[Stage]:
    """The steps that `invert` takes, T in all."""
    inversion, patches = config.inversion, config.model.num_patches
    v = inversion.images_each
    if inversion.mode == "dense":
        return [Stage(inversion.steps, patches)]
    if inversion.mode == "pri4":
        times = [i * inversion.steps // v for i in range(v + 1)]
        counts = [patches - i * (patches // v) for i in range(v)]
    else:
        times = [0, *halting_steps(inversion), inversion.steps]
        counts = alive_counts(patches, inversion)
    return [Stage(end - begin, alive) for (begin, end), alive in zip(pairwise(times), counts, strict=True)]


def bound(shape: Shape, config: Config, dense: Config) -> float:
    """How many times more finished images than `dense` a FLOP can give."""
    ours, theirs = (each.inversion.images_each / shape.run_flops(stages(each)) for each in (config, dense))
    return ours / theirs
