"""Training at the client: one ViT on the client's own images."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..data.images import Images, prepare
from ..vit.tokens import TokenLogits, all_positions, forward_tokens, patchify
from .optim import Stepper


def train_local(
    vit: VisionTransformer,
    images: Images,
    config: Config,
    rng: torch.Generator,
    device: torch.device,
    prox_mu: float = 0.0,
) -> float:
    """Train `vit` in place and return the last epoch's mean loss.

    `prox_mu` is FedProx's μ: the loss gains μ/2 ‖w - w⁰‖² (Li et al. 2020, eq. 2), with w⁰ the weights given.
    """
    local = config.local
    vit.to(device).train()
    start = [weight.detach().clone() for weight in vit.parameters()] if prox_mu else []
    batches = -(-len(images) // local.batch_size)
    stepper = Stepper(vit.parameters(), local, total_steps=local.epochs * batches)
    epoch_loss = 0.0
    for _ in range(local.epochs):
        losses = []
        for batch in torch.randperm(len(images), generator=rng).split(local.batch_size):
            pixels = prepare(images.pixels[batch], config.model.img_size).to(device)
            labels = images.labels[batch].to(device)
            if local.augment:
                pixels = shift_and_flip(pixels, flip=config.data.flip, rng=rng)
            patches = patchify(pixels, config.model.patch_size)
            logits = forward_tokens(vit, patches, all_positions(patches))
            loss = label_loss(logits, labels, local.label_smoothing, local.token_loss)
            stepper.step(loss + proximal(vit, start, prox_mu) if prox_mu else loss)
            losses.append(loss.item() * len(batch))
        epoch_loss = sum(losses) / len(images)
    vit.eval()
    return epoch_loss


def label_loss(logits: TokenLogits, labels_B: Tensor, smoothing: float, token_weight: float) -> Tensor:
    """Cross-entropy of the class token, plus `token_weight` times the mean over patch tokens of theirs.

    LV-ViT's objective (Jiang et al. 2021) with the image's label on every token [C]; without it the patch logits, which
    relabelling asks for, would mean nothing.
    """
    loss = F.cross_entropy(logits.cls, labels_B, label_smoothing=smoothing)
    if token_weight:
        tokens_BYK = logits.patches.transpose(1, 2)
        targets_BK = labels_B[:, None].expand(-1, tokens_BYK.shape[2])
        loss = loss + token_weight * F.cross_entropy(tokens_BYK, targets_BK, label_smoothing=smoothing)
    return loss


def proximal(vit: VisionTransformer, start: list[Tensor], mu: float) -> Tensor:
    """FedProx's term μ/2 ‖w - w⁰‖²."""
    squares = [(weight - old).square().sum() for weight, old in zip(vit.parameters(), start, strict=True)]
    return mu / 2 * torch.stack(squares).sum()


def shift_and_flip(images_BCHW: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side (edges repeated), and mirror it with probability 1/2."""
    batch, _, height, width = images_BCHW.shape
    reach = max(1, height // 8)
    dy, dx = torch.randint(-reach, reach + 1, (2, batch, 1), generator=rng)
    rows = (torch.arange(height) + dy).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + dx).clamp(0, width - 1)  # (B, W)
    if flip:
        mirrored = torch.rand(batch, 1, generator=rng) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    device = images_BCHW.device
    which = torch.arange(batch, device=device)[:, None, None]
    moved = images_BCHW.permute(0, 2, 3, 1)[which, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
    return moved.permute(0, 3, 1, 2)
