"""Training at the client: one ViT on the client's own images."""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..config import Config
from ..data.images import Images, prepare
from ..vit.optim import client_stepper
from ..vit.tokens import all_positions, forward_tokens, patchify
from .losses import label_loss, proximal
from .outliers import evenness_loss, outliers, skew


def train_local(
    vit: VisionTransformer,
    images: Images,
    config: Config,
    rng: torch.Generator,
    device: torch.device,
    prox_mu: float = 0.0,
    on_epoch: Callable[[float], None] = lambda _: None,
) -> float:
    """Train `vit` in place and return the last epoch's mean loss of its own images, without the proximal term.

    `prox_mu` is FedProx's μ; w⁰ are the weights given. The skew that `local.outliers` is multiplied by is that of
    `images`. `on_epoch` gets each epoch's loss.
    """
    local = config.local
    vit.to(device).train()
    start = [weight.detach().clone() for weight in vit.parameters()] if prox_mu else []
    strangeness = local.outliers * skew(images.labels, config.model.num_classes)
    batches = -(-len(images) // local.batch_size)
    stepper = client_stepper(vit, local, total_steps=local.epochs * batches)
    epoch_loss = 0.0
    for _ in range(local.epochs):
        losses, shuffled = [], torch.randperm(len(images), generator=rng).split(local.batch_size)
        for batch in shuffled:
            pixels = prepare(images.pixels[batch].to(device), config.model)
            labels = images.labels[batch].to(device)
            if local.augment:
                pixels = shift_and_flip(pixels, flip=config.data.flips, rng=rng)
            patches = patchify(pixels, config.model.patch_size)
            logits = forward_tokens(vit, patches, all_positions(patches))
            loss = label_loss(logits, labels)
            losses.append(loss.detach())  # its value would make the CPU wait for a GPU at every step
            if strangeness:
                strange = outliers(pixels, config.model.patch_size, rng)
                answers = forward_tokens(vit, strange, all_positions(strange))
                loss = loss + strangeness * evenness_loss(answers)
            stepper.step(loss + proximal(vit.parameters(), start, prox_mu) if prox_mu else loss)
        of_batches = zip(torch.stack(losses).tolist(), shuffled, strict=True)
        epoch_loss = sum(mean_loss * len(batch) for mean_loss, batch in of_batches) / len(images)
        on_epoch(epoch_loss)
    vit.eval()
    return epoch_loss


def shift_and_flip(images_BCHW: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, edges repeated; mirror it at even odds."""
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
