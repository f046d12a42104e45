"""Run a timm ViT on some of its patches.

Absent patches cost nothing: pixels are patches here, and a patch that is not given is neither embedded nor attended.
Shapes: B images, N patches, K of them given, E = C·p·p numbers in a patch, P prefix tokens ([CLS], registers),
D width, H heads, Y classes, g = √N patches along a side.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

# (network, patches (B, K, E), positions (B, K)) -> tensors: `forward_cls`, `forward_tokens`
Question = Callable[[Any, Tensor, Tensor], tuple[Tensor, ...]]


class TokenLogits(NamedTuple):
    cls: Tensor  # (B, Y)
    patches: Tensor  # (B, K, Y): the shared head on every patch token


def patchify(images_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, S, S) -> (B, N, E), patches row by row, each flattened as (C, p, p)."""
    return F.unfold(images_BCHW, patch, stride=patch).transpose(1, 2)


def unpatchify(patches_BNE: Tensor, patch: int) -> Tensor:
    """(B, N, E) -> (B, C, S, S), the inverse of `patchify`."""
    side = round(patches_BNE.shape[1] ** 0.5) * patch
    return F.fold(patches_BNE.transpose(1, 2), side, patch, stride=patch)


def take(values_BN: Tensor, ids_BK: Tensor) -> Tensor:
    """Values of the chosen tokens: (B, N, ...) by (B, K) -> (B, K, ...)."""
    index = ids_BK.reshape(*ids_BK.shape, *[1] * (values_BN.dim() - 2))
    return values_BN.gather(1, index.expand(*ids_BK.shape, *values_BN.shape[2:]))


def put(values_BN: Tensor, ids_BK: Tensor, chosen_BK: Tensor) -> Tensor:
    """A copy of (B, N, ...) in which the tokens `ids_BK` have the values (B, K, ...)."""
    index = ids_BK.reshape(*ids_BK.shape, *[1] * (values_BN.dim() - 2))
    return values_BN.scatter(1, index.expand_as(chosen_BK), chosen_BK)


def all_positions(patches_BNE: Tensor) -> Tensor:
    """The positions (B, N) of whole images' patches, in order."""
    batch, num_patches = patches_BNE.shape[:2]
    return torch.arange(num_patches, device=patches_BNE.device).expand(batch, -1)


def forward_tokens(vit: VisionTransformer, patches_BKE: Tensor, positions_BK: Tensor) -> TokenLogits:
    """Logits of the class token and of every given patch.

    With all patches given, `cls` equals `vit(images)` (tested). Patches may come in any order.
    """
    x = embed(vit, patches_BKE, positions_BK)
    for block in vit.blocks:
        x = block(x)
    x = vit.norm(x)
    return TokenLogits(vit.forward_head(x), vit.head(vit.fc_norm(x[:, vit.num_prefix_tokens :])))


class ClassAnswer(NamedTuple):
    logits: Tensor  # (B, Y)
    attention: Tensor  # (B, K): of [CLS] to each given patch in the last block, mean over heads: SMI's importance [C]


def forward_cls(vit: VisionTransformer, patches_BKE: Tensor, positions_BK: Tensor) -> ClassAnswer:
    """The class logits of `forward_tokens` and the last block's attention, without what only patch logits need.

    In the last block [CLS] alone asks: patches give keys and values, but get neither attention nor an MLP.
    """
    x = embed(vit, patches_BKE, positions_BK)
    for block in vit.blocks[:-1]:
        x = block(x)
    cls_B1D, attention_BT = _cls_block(vit.blocks[-1], x)
    return ClassAnswer(vit.forward_head(vit.norm(cls_B1D)), attention_BT[:, vit.num_prefix_tokens :])


class _Asked(nn.Module):
    """A question as a module, which `functional_call` needs."""

    def __init__(self, network: nn.Module, question: Question) -> None:
        super().__init__()
        self.network, self.question = network, question

    def forward(self, patches_BKE: Tensor, positions_BK: Tensor) -> Any:
        return self.question(self.network, patches_BKE, positions_BK)


def ask_with(
    weights: Mapping[str, Tensor], network: nn.Module, question: Question, patches_BKE: Tensor, positions_BK: Tensor
) -> Any:
    """The answer of `network`, had it these weights: for `torch.func`, which differentiates and batches by weights."""
    named = {f"network.{name}": tensor for name, tensor in weights.items()}
    return functional_call(_Asked(network, question), named, (patches_BKE, positions_BK))


def random_flip(
    patches_BKE: Tensor, positions_BK: Tensor, grid: int, patch: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mirror each image with probability 1/2: the positions of its patches, and the pixels in them."""
    mirrored = (torch.rand(len(positions_BK), 1, generator=rng) < 0.5).to(positions_BK.device)
    columns = positions_BK % grid
    pixels = patches_BKE.unflatten(2, (-1, patch))  # (B, K, C·p, p)
    flipped = torch.where(mirrored[..., None, None], pixels.flip(-1), pixels).flatten(2)
    return flipped, positions_BK - columns + torch.where(mirrored, grid - 1 - columns, columns)


def embed_patches(vit: VisionTransformer, patches_BKE: Tensor) -> Tensor:
    """What timm's convolution makes of the patches: (B, K, D)."""
    projection = vit.patch_embed.proj
    return F.linear(patches_BKE, projection.weight.flatten(1), projection.bias)


def embed(vit: VisionTransformer, patches_BKE: Tensor, positions_BK: Tensor) -> Tensor:
    """(B, P + K, D): prefix tokens, and the given patches with the embeddings of their positions."""
    tokens = vit.patch_embed.norm(embed_patches(vit, patches_BKE))  # (B, K, D)
    # timm adds positions to a grid of patches where the image size may vary, and else to a row of them.
    rows = vit.patch_embed.grid_size if vit.dynamic_img_size else (vit.patch_embed.num_patches,)
    empty = tokens.new_zeros(1, *rows, tokens.shape[-1])
    table = vit._pos_embed(empty)[0]  # (P + N, D): what timm gives to patches of zeros
    prefix, places = table[: vit.num_prefix_tokens], table[vit.num_prefix_tokens :]
    x = torch.cat([prefix.expand(len(tokens), -1, -1), tokens + places[positions_BK]], dim=1)
    embedded: Tensor = vit.norm_pre(x)
    return embedded


def _cls_block(block: Block, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """A timm `Block` for the first token only: (B, 1, D), and its attention to all T tokens, mean over heads (B, T)."""
    attn = block.attn
    normed = block.norm1(x_BTD)
    width, heads = attn.attn_dim, (attn.num_heads, attn.head_dim)
    weight, bias = attn.qkv.weight, attn.qkv.bias
    bias_q, bias_kv = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(normed[:, :1], weight[:width], bias_q).unflatten(2, heads).transpose(1, 2)  # (B, H, 1, D/H)
    keys_values = F.linear(normed, weight[width:], bias_kv).unflatten(2, (2, *heads))
    k, v = keys_values.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
    q, k = attn.q_norm(q), attn.k_norm(k)
    row = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, H, 1, T)
    mixed = attn.norm((row @ v).transpose(1, 2).flatten(2))
    if attn.gate is not None:
        mixed = mixed * attn.gate(normed[:, :1]).sigmoid()
    x = x_BTD[:, :1] + block.ls1(attn.proj(mixed))
    return x + block.ls2(block.mlp(block.norm2(x))), row.mean(dim=1).squeeze(1)
