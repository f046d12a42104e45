"""Does a stranger's model compute? Weights may all be finite and still give NaN, which would spoil every mean.

Shapes: B images, M patches, E numbers in a patch.
"""

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..common.rng import stream
from ..config import ModelConfig
from .names import normalisation
from .taps import network_of
from .tokens import all_positions, forward_tokens, patchify

NOISE_IMAGES = 4


def computes(weights: Mapping[str, Tensor], model: ModelConfig) -> bool:
    """Whether logits are finite on noise, on black and on white images; and the gradient of a plain ViT's."""
    network = network_of(model, {name: tensor.float() for name, tensor in weights.items()}).requires_grad_(False)
    images = _probes(model).split(1)
    if not isinstance(network, VisionTransformer):
        return all(bool(torch.isfinite(network(image)).all()) for image in images)
    return all(_is_finite(network, patchify(image, model.patch_size)) for image in images)


def _is_finite(vit: VisionTransformer, patches_BME: Tensor) -> bool:
    """One image at a time, since a gradient holds on to every layer's activations."""
    patches_BME.requires_grad_()
    answer = forward_tokens(vit, patches_BME, all_positions(patches_BME))
    confidence = answer.cls.log_softmax(-1).sum() + answer.patches.log_softmax(-1).sum()
    (slope,) = torch.autograd.grad(confidence, patches_BME)
    return bool(torch.isfinite(confidence) and torch.isfinite(slope).all())


def _probes(model: ModelConfig) -> Tensor:
    """(B, C, S, S), normalised, within the limits of a picture."""
    mean, std = normalisation(model)
    size = (model.in_chans, model.img_size, model.img_size)
    noise = torch.rand(NOISE_IMAGES, *size, generator=stream(0, "probe"))
    pixels = torch.cat([noise, torch.zeros(1, *size), torch.ones(1, *size)])
    return (pixels - mean[:, None, None]) / std[:, None, None]
