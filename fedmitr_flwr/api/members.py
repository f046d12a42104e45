"""Vision transformers that anybody has trained, as what a server phase fuses: one architecture, and K uploads."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..common.errors import ModelError, UploadError
from ..common.fingerprint import core
from ..config import ModelConfig
from ..config.limits import SEPARATOR
from ..uploads.upload import Upload
from ..vit.build import TOLERANCE, Weights, require_token_code, vit_of, without_numbers
from ..vit.names import STATISTICS, architecture, channel_statistics, require_plain
from ..vit.weights_file import read_weights, without_prefix

Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

PLAIN = "vit_tiny_patch16_224"  # of which a network without a name is a variant
_NEEDED = {  # to describe a network, with their numbers of axes
    **{"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4},
    **{"blocks.0.mlp.fc1.weight": 2, "head.weight": 2},
}


def members(
    models: Sequence[Model],
    name: str | None = None,
    kwargs: Mapping[str, object] | None = None,
    sizes: Sequence[int] | None = None,
    counts: Sequence[Sequence[int]] | None = None,
) -> tuple[ModelConfig, list[Upload]]:
    """The architecture that all `models` have, and each one's weights with its numbers of images, else one each.

    Args:
        models: networks of timm, their state dicts, or paths of safetensors files.
        name: timm's, of state dicts and files.
        kwargs: of `timm.create_model` beside the name, as far as the weights' shapes do not tell them.
        sizes: training images of each model.
        counts: training images of each model by class; they give the sizes, too.

    Raises:
        ModelError: a model cannot be read, or is none that can be run by patches, or is not as the first one is.
    """
    if not models:
        raise ModelError("there are no models; give two or more")
    labels = [str(model) if isinstance(model, str | os.PathLike) else f"model {k}" for k, model in enumerate(models)]
    config = described(models[0], _state(models[0], labels[0]), name, dict(kwargs or {}))
    require_token_code(config)
    states = [weights_of(model, label, config) for model, label in zip(models, labels, strict=True)]
    return config, _uploads(states, config.num_classes, sizes, counts)


def weights_of(model: Model, label: str, config: ModelConfig) -> Weights:
    """Its weights by timm's names, in float32 on the CPU; errors call the model `label`.

    Raises:
        ModelError: it cannot be read, or is not of this architecture.
    """
    state = _state(model, label)
    wanted = {key: tuple(tensor.shape) for key, tensor in without_numbers(config).state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if other := sorted(wanted.items() ^ found.items()):
        key = other[0][0]
        raise ModelError(
            f"{label}: {key} is {found.get(key, 'missing')}, not {wanted.get(key, 'in the model')}; "
            "give models of one architecture and of the same classes"
        )
    if bad := next((key for key, tensor in state.items() if not torch.isfinite(tensor).all()), None):
        raise ModelError(f"{label}: {bad} has NaN or infinity; leave that model out")
    if isinstance(model, nn.Module):
        _require_same_answers(config, model, state)
    return state


def described(model: Model, state: Mapping[str, Tensor], name: str | None, kwargs: dict[str, object]) -> ModelConfig:
    """The settings `model.*` with which timm builds this network: what its name, its weights and itself tell."""
    given: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(model, nn.Module):
        require_plain(model, type(model).__name__)
        name = name or given.get("architecture") or PLAIN
        kwargs = _own(model) | kwargs
    if name is None:
        raise ModelError("weights alone do not tell all of their architecture; give its name, such as model='vit_...'")
    architecture(name)  # a name that timm does not have is refused with the nearest one
    with torch.device("meta"):
        usual = timm.create_model(name)
    kwargs = _of_shapes(state, usual) | kwargs
    reference = {**_of_shapes(usual.state_dict(), usual), **_own(usual)}
    differs = {key: value for key, value in kwargs.items() if key not in reference or reference[key] != value}
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    prefix = 0 if kwargs.get("no_embed_class", usual.no_embed_class) else 1 + _registers(state)
    grid = round((state["pos_embed"].shape[1] - prefix) ** 0.5)
    config = ModelConfig(
        name=name,
        img_size=grid * patch,
        patch_size=patch,
        in_chans=channels,
        num_classes=len(state["head.weight"]),
        kwargs=_written(differs),
    )
    pixels = {key: tuple(given[key]) for key in STATISTICS if len(given.get(key, ())) == channels}
    if pixels and tuple(pixels.values()) != channel_statistics(config):
        config = replace(config, kwargs=_written({**differs, **pixels}))
    return config


def _written(arguments: Mapping[str, object]) -> str:
    return f" {SEPARATOR} ".join(f"{key}={value!r}" for key, value in sorted(arguments.items()))


def _registers(state: Mapping[str, Tensor]) -> int:
    return state["reg_token"].shape[1] if "reg_token" in state else 0


def _of_shapes(state: Mapping[str, Tensor], usual: VisionTransformer) -> dict[str, object]:
    """Arguments that the names and shapes of weights tell; heads are as wide as the `usual` network's."""
    width = state["cls_token"].shape[-1]
    return {
        "embed_dim": width,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "num_heads": max(1, width // usual.blocks[0].attn.head_dim),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in state else None,
        "pre_norm": "norm_pre.weight" in state,
        "reg_tokens": _registers(state),
    }


def _own(vit: Any) -> dict[str, object]:
    """Arguments that only the network itself tells."""
    return {"num_heads": vit.blocks[0].attn.num_heads, "no_embed_class": vit.no_embed_class}


def _state(model: Model, label: str) -> Weights:
    """As `weights_of`, of any architecture that has the parts by which it is described."""
    if isinstance(model, nn.Module):
        state: Mapping[str, Tensor] = model.state_dict()
    elif isinstance(model, Mapping):
        state = model
    else:
        try:
            state = read_weights(Path(model).expanduser())
        except ModelError as error:
            raise ModelError(str(error).removeprefix("model.weights: ")) from error
    if other := next((key for key, value in state.items() if not isinstance(value, Tensor)), None):
        raise ModelError(f"{label}: {other!r} is no tensor; give the state dict alone: checkpoint['state_dict']")
    state = without_prefix(state, label)[0]
    for key, axes in _NEEDED.items():
        if key not in state or state[key].dim() != axes:
            found = f"of {state[key].dim()} axes" if key in state else "missing"
            raise ModelError(f"{label}: {key} is {found}; give a vision transformer of timm with class token and head")
    return {key: tensor.detach().to("cpu", torch.float32) for key, tensor in state.items()}


@torch.no_grad()
def _require_same_answers(config: ModelConfig, model: nn.Module, state: Weights) -> None:
    """Raise ModelError unless the network that timm builds answers as the given one does."""
    images = torch.randn(
        1, config.in_chans, config.img_size, config.img_size, generator=torch.Generator().manual_seed(0)
    )
    training, place = model.training, next(model.parameters())
    try:
        wanted = model.eval()(images.to(place)).float().cpu()
        found = vit_of(config, state)(images)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"timm does not build this network by {config.name!r}, {config.kwargs!r}: {error}") from error
    finally:
        model.train(training)
    tolerance = TOLERANCE if place.dtype == torch.float32 else 0.1
    if not (found - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item()):
        raise ModelError(
            f"the network that timm builds by {config.name!r}, {config.kwargs!r} does not answer as the given one; "
            "say what is special about it by kwargs="
        )


def _uploads(
    states: Sequence[Mapping[str, Tensor]],
    num_classes: int,
    sizes: Sequence[int] | None,
    counts: Sequence[Sequence[int]] | None,
) -> list[Upload]:
    for what, given in (("sizes", sizes), ("counts", counts)):
        if given is not None and len(given) != len(states):
            raise UploadError(f"{what} has {len(given)} entries, but there are {len(states)} models; give one for each")
    if counts is not None and any(len(row) != num_classes or min(row) < 0 for row in counts):
        raise UploadError(f"counts must have {num_classes} numbers >= 0 for each model, one by class")
    if sizes is None:
        sizes = [1] * len(states) if counts is None else [sum(row) for row in counts]
    if min(sizes) < 1:
        raise UploadError(f"sizes = {list(sizes)}: every model has learned from one image at least")
    rows = [None] * len(states) if counts is None else [tuple(row) for row in counts]
    return [
        Upload(k, state, size, 0.0, core(), row)
        for k, (state, size, row) in enumerate(zip(states, sizes, rows, strict=True))
    ]
