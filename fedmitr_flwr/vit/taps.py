"""Features tapped at several depths of a ViT, and the models that read them: each is one file.

What separates classes is spread over the depths of a network: taps are worth 5 to 20 points over the last class token
alone (docs/LOG.md). Of block outputs, normalised token by token (LayerNorm without γ and β), they are: class token
and mean patch of each of the last `DEPTHS` blocks, and the mean patch of each quarter of the image at half the depth.
A public random projection makes features of them that are small enough to be summed and sent.

Shapes: B images, N patches, D the ViT's width, L = min(`DEPTHS`, its blocks), T = (2 L + 4) D taps,
M = min(T, `FEATURES`) numbers in a feature, Y classes.
"""

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import RunError, unread
from ..common.files import load_tensors
from ..common.rng import stream
from ..config import ModelConfig
from .build import Weights, without_numbers

DEPTHS = 4  # blocks, from the last one back
FEATURES = 512  # numbers; sums over them are 0.55 MB of float32 for 10 classes, and 256 lost 8 points on CIFAR-10

_BACKBONE, _CLOSED, _STUDENT = "backbone.", "closed.", "student."  # before the names of a part's tensors


def taps(vit: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """(B, T) of normalised images."""
    depth = len(vit.blocks)
    last = range(max(0, depth - DEPTHS), depth)
    wanted = sorted({*last, depth // 2})
    outputs = vit.forward_intermediates(
        images_BCHW, wanted, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    normed = {block: [F.layer_norm(x, x.shape[-1:]) for x in pair] for block, pair in zip(wanted, outputs, strict=True)}
    parts = [part for block in last for part in (normed[block][1][:, 0], normed[block][0].mean(1))]
    patches_BND = normed[depth // 2][0]
    side = math.isqrt(patches_BND.shape[1])
    quarters = F.adaptive_avg_pool2d(patches_BND.mT.unflatten(2, (side, side)), 2)
    tapped: Tensor = torch.cat([*parts, quarters.flatten(1)], dim=1)
    return tapped


def count_taps(weights: Mapping[str, Tensor]) -> int:
    """T of a ViT with weights like these; only names and shapes are looked at."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    width: int = weights["head.weight"].shape[1]
    return (2 * min(DEPTHS, len(blocks)) + 4) * width


@lru_cache(maxsize=4)
def projection(num_taps: int) -> Tensor:
    """(T, M), float64: a feature is taps @ projection, and its numbers are about as large as taps are.

    Random signs (Achlioptas 2003) of a fixed seed, drawn as whole numbers: the same bits everywhere, so nobody sends
    them. The identity where there are no more taps than `FEATURES`.
    """
    if num_taps <= FEATURES:
        return torch.eye(num_taps, dtype=torch.float64)
    signs = torch.randint(2, (num_taps, FEATURES), generator=stream(0, "taps"))
    return (2 * signs - 1).double() / math.sqrt(num_taps)


class TapModel(nn.Module):
    """A ViT and one linear layer on its taps: images (B, C, S, S) -> scores (B, Y)."""

    def __init__(self, vit: VisionTransformer, num_classes: int) -> None:
        """`vit` loses its head."""
        super().__init__()
        num_taps = count_taps(vit.state_dict())
        self.head = nn.Linear(num_taps, num_classes, device=vit.head.weight.device)
        vit.reset_classifier(0)
        self.backbone = vit

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores: Tensor = self.head(taps(self.backbone, images_BCHW))
        return scores


class SumModel(nn.Module):
    """A model on taps and a ViT beside it, whose scores are added: images (B, C, S, S) -> scores (B, Y)."""

    def __init__(self, closed: TapModel, student: VisionTransformer) -> None:
        super().__init__()
        self.closed, self.student = closed, student

    def forward(self, images_BCHW: Tensor) -> Tensor:
        scores: Tensor = self.closed(images_BCHW) + self.student(images_BCHW)
        return scores


def on_taps(start: Mapping[str, Tensor], weight_YM: Tensor, bias_Y: Tensor) -> Weights:
    """The weights of the `TapModel` that scores the features of the ViT `start` by this head.

    The projection is folded into the head, so that who loads the model needs neither its seed nor this version's rule.
    """
    backbone = {_BACKBONE + name: tensor for name, tensor in start.items() if not name.startswith("head.")}
    weight_YT = weight_YM @ projection(count_taps(start)).T
    return backbone | {"head.weight": weight_YT.float(), "head.bias": bias_Y.float()}


def side_by_side(closed: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> Weights:
    """The weights of the `SumModel` of a `TapModel` and a ViT."""
    parts = ((_CLOSED, closed), (_STUDENT, student))
    return {beginning + name: tensor for beginning, part in parts for name, tensor in part.items()}


def network_of(model: ModelConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network around these very tensors, whichever of these models they are of; otherwise as `build.vit_of`."""
    return _around(without_numbers(model), weights)


def load_model(folder: Path) -> nn.Module:
    """A global model by its two files alone, in eval mode: normalised images (B, C, S, S) -> scores (B, Y).

    Raises:
        RunError: model.safetensors is missing or was altered, or there is no config.json beside it.
    """
    weights, _ = load_tensors(folder / "model.safetensors")
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(unread("model's description", path, error)) from error
    with torch.device("meta"):  # where nothing is drawn
        vit = timm.create_model(about["architecture"], **about["model_args"])
    return _around(vit, weights).eval()


def _around(vit: VisionTransformer, weights: Mapping[str, Tensor]) -> nn.Module:
    network: nn.Module = vit
    if any(name.startswith(_STUDENT) for name in weights):
        network = SumModel(TapModel(deepcopy(vit), vit.num_classes), vit)
    elif any(name.startswith(_BACKBONE) for name in weights):
        network = TapModel(vit, vit.num_classes)
    network.load_state_dict(dict(weights), assign=True)
    return network
