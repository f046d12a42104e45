"""What a client's linear layers are given on its own images: second moments, in a few leading directions of each.

RegMean (Jin et al. 2023) [C] merges models in closed form if each client sends the second moments of its layers'
inputs. Whole, they are as large as the weights. Here a client sends the `DIRECTIONS` leading directions of each,
and one number for all the others [M]: docs/LOG.md.

Shapes: n images, I inputs of a layer, one of them the constant 1 of its bias, R = min(`DIRECTIONS`, I)
directions, L layers.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..config.sections import DIRECTIONS
from ..data.images import Images, prepare
from ..vit.tokens import patchify

PREFIX = "inputs/"  # before a layer's name
REST = "inputs/rest"  # of all layers, in the order of their names
_BATCH = 64  # images


def widths(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """I of each linear layer, sorted by name; only shapes are looked at."""
    layers = sorted(name.removesuffix(".weight") for name in weights if name.endswith(".weight"))
    shapes = {layer: weights[f"{layer}.weight"].shape for layer in layers}
    return {
        layer: shape[1:].numel() + (f"{layer}.bias" in weights) for layer, shape in shapes.items() if len(shape) > 1
    }


def like(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `measure` gives for a model with weights like these, without its numbers."""
    inputs = widths(weights)
    rows = {
        PREFIX + layer: torch.empty(min(DIRECTIONS, width), width, device="meta") for layer, width in inputs.items()
    }
    return rows | {REST: torch.empty(len(inputs), device="meta")}


@torch.no_grad()
def measure(vit: VisionTransformer, images: Images, model: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """What a client uploads of `vit`, as it trained it, and its own images, whole and unaugmented.

    For each layer `inputs/NAME` (R, I), and `inputs/rest` (L,); see `leading`. float32, on the CPU.
    """
    moments, rests = {}, []
    for layer, moment_II in second_moments(vit, images, model, device).items():
        moments[PREFIX + layer], rest = leading(moment_II, DIRECTIONS)
        rests.append(rest)
    return moments | {REST: torch.stack(rests)}


def second_moments(
    vit: VisionTransformer, images: Images, model: ModelConfig, device: torch.device
) -> dict[str, Tensor]:
    """The mean of x xᵀ over all that each layer is given, (I, I) by name: an x per token, or per image for the head."""
    vit.to(device).eval()
    layers = widths(vit.state_dict())
    sums = {layer: torch.zeros(width, width, device=device) for layer, width in layers.items()}
    seen = dict.fromkeys(layers, 0)

    def hear(layer: str, module: nn.Module, given: tuple[Tensor]) -> None:
        x = patchify(given[0], vit.patch_embed.patch_size[0]) if isinstance(module, nn.Conv2d) else given[0]
        x_RI = F.pad(x.flatten(0, -2), (0, layers[layer] - x.shape[-1]), value=1.0)
        sums[layer] += x_RI.T @ x_RI
        seen[layer] += len(x_RI)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(vit.get_submodule(layer).register_forward_pre_hook(partial(hear, layer)))
        for pixels in images.pixels.split(_BATCH):
            vit(prepare(pixels.to(device), model))
    return {layer: sums[layer] / seen[layer] for layer in layers}


def leading(moment_II: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """S (R, I) and ρ () of SᵀS + ρ 1, which has a second moment's leading eigenvectors and eigenvalues, and its trace.

    ρ is the mean of the other eigenvalues; 0 where there are none.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II.cpu().double())
    values_I, vectors_II = values_I.flip(0).clamp_min(0), vectors_II.flip(1)
    others = values_I[directions:]
    rest = others.mean() if len(others) else values_I.new_zeros(())
    rows_RI = (values_I[:directions] - rest).clamp_min(0).sqrt()[:, None] * vectors_II[:, :directions].T
    return rows_RI.float().contiguous(), rest.float()


def moment(rows_RI: Tensor, rest: Tensor) -> Tensor:
    """The second moment (I, I) for which `leading` gave S and ρ, in float64."""
    rows_RI = rows_RI.double()
    moment_II = rows_RI.T @ rows_RI
    moment_II.diagonal().add_(rest.double())
    return moment_II


def problem(moments: Mapping[str, Tensor]) -> str | None:
    """Why these cannot be second moments; None: they can. Names, shapes and types are looked at before."""
    if (moments[REST] < 0).any():
        return f"its statistics' {REST} has a negative number; do not edit uploads"
    layers = sorted(name for name in moments if name != REST)
    empty = [name for name, rest in zip(layers, moments[REST], strict=True) if not rest and not moments[name].any()]
    return f"its statistics' {empty[0]} says that the layer was given nothing; do not edit uploads" if empty else None
