"""What timm knows of a vision transformer by its name: which it is, its sizes, and how its pixels are normalised."""

import difflib
import functools
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from ..common.errors import ModelError
from ..config import ModelConfig
from ..config.limits import check
from ..config.sections import SMALL

RESIZED = "bilinear"  # how images are resized, antialiased, here and as they are decoded
STATISTICS = ("mean", "std")  # in model.kwargs: of the pixels, one number by channel; no arguments of the network

_UNBUILDABLE = (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Architecture:
    """One of timm's plain vision transformers. Pixels are normalised per channel, on the 0..1 scale."""

    patch_size: int
    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@functools.cache
def architecture(name: str) -> Architecture:
    """The sizes of timm's `name` and the normalisation that its published weights were trained with.

    Raises:
        ModelError: there is no such model, or it is no plain vision transformer with a class token.
    """
    if not timm.is_model(name):
        raise ModelError(f"model.name = {name!r} is not a timm model; {_examples(name)}")
    try:
        with torch.device("meta"):
            vit = timm.create_model(name)
    except _UNBUILDABLE as error:
        raise ModelError(f"timm cannot build model.name = {name!r} ({error}); {_examples(name)}") from error
    require_plain(vit, name)
    config = timm.get_pretrained_cfg(name)
    assert config is not None, name
    channels, height, width = config.input_size
    assert height == width, f"{name}: {config.input_size}"  # all plain ones are square
    return Architecture(vit.patch_embed.patch_size[0], height, channels, tuple(config.mean), tuple(config.std))


def _examples(name: str) -> str:
    families = ["vit_*", "deit*"]
    names = [SMALL, *timm.list_models(families), *timm.list_pretrained(families)]
    begin = [each for each in names if name and each.startswith(name)]
    near = difflib.get_close_matches(name, names, n=3) or begin[:5]
    if near:
        return f"did you mean {' | '.join(near)}?"
    return "use small, or a plain ViT such as deit_tiny_patch16_224; timm.list_models(['vit_*', 'deit*']) names them"


def require_plain(vit: Any, name: str) -> None:
    """Token dropping and [CLS] importance need a plain ViT whose class token is classified.

    Raises:
        ModelError: it has another structure. The part that differs is named.
    """
    if not isinstance(vit, VisionTransformer):
        raise ModelError(
            f"model.name = {name!r} is a {type(vit).__name__}, no plain vision transformer; {_examples('')}"
        )
    parts: list[tuple[object, type]] = [(vit, VisionTransformer), (vit.patch_embed, PatchEmbed)]
    for block in vit.get_submodule("blocks").children():
        parts += [(block, Block), (getattr(block, "attn", None), Attention)]
    kind = next((type(part).__name__ for part, wanted in parts if type(part) is not wanted), None)
    if kind:
        raise ModelError(
            f"model.name = {name!r} is or has a {kind}; use a plain ViT or DeiT (no distilled, hybrid or Swin one)"
        )
    if vit.global_pool != "token" or vit.cls_token is None or vit.pos_embed is None:
        raise ModelError(
            f"model.name = {name!r} pools by {vit.global_pool!r}; use a ViT with a classified [CLS] token and positions"
        )
    if vit.patch_embed.patch_size[0] != vit.patch_embed.patch_size[1]:
        raise ModelError(
            f"model.name = {name!r} has patches of {vit.patch_embed.patch_size}; use one with square patches"
        )


def normalisation(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Mean (C,) and standard deviation (C,) of `channel_statistics`."""
    mean, std = channel_statistics(model)
    return torch.tensor(mean), torch.tensor(std)


def channel_statistics(model: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Each channel's mean and standard deviation on the 0..1 scale, as the model's published weights were trained with.

    For a timm name they are those of its `pretrained_cfg`; where the model has another number of channels than its
    published weights, each channel gets their mean over channels. `small`, which has no published weights, has
    ImageNet's for colour, and 0.5 and 0.5 otherwise. `mean` and `std` in model.kwargs win.

    Raises:
        ConfigError: they are no numbers by channel.
    """
    channels = model.in_chans
    if given := [model.arguments[name] for name in STATISTICS if name in model.arguments]:
        fit = [isinstance(one, tuple | list) and [type(each) for each in one] == [float] * channels for one in given]
        check("model.kwargs", model.kwargs, fit == [True, True], f"mean=(...) | std=(...), {channels} decimals in each")
        mean, std = (tuple(map(float, one)) for one in given)  # type: ignore[call-overload]
        return mean, std
    if model.name == SMALL:
        grey = (0.5,) * channels
        return (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else (grey, grey)
    published = architecture(model.name)
    if len(published.mean) == channels:
        return published.mean, published.std
    mean, std = ((sum(each) / len(each),) * channels for each in (published.mean, published.std))
    return mean, std
