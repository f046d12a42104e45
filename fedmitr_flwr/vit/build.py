"""Build a timm vision transformer, and the public weights from which every client starts."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..common.errors import ModelError, say_once
from ..common.rng import seeded_init, stream
from ..config import ModelConfig
from ..config.sections import SMALL
from .names import RESIZED, STATISTICS, architecture, channel_statistics, require_plain
from .tokens import all_positions, forward_cls, forward_tokens, patchify
from .weights_file import read_weights, without_prefix

TOLERANCE = 1e-5  # largest `token_difference` of a model that may be used
SHALLOW = 2  # blocks that a trial of the token code has: all of a plain ViT's are alike
NOISE = 0.05  # that a trial adds to each parameter: fresh biases are 0, norms 1, and some layer scales 1e-6

_MISFITS = (KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError, AttributeError)
_OTHER_HEADS = ("head_dist.", "fc.", "classifier.", "pre_logits.")  # of tasks that the model here does not have

Weights = dict[str, Tensor]


def timm_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments with which plain `timm.create_model` builds the same network.

    Its `pretrained_cfg` then says how pixels become input, and `timm.data.resolve_model_data_config` gives that back:
    images squashed to the model's size and normalised by `mean` and `std`.
    """
    assert model.resolved, model
    shape = {"img_size": model.img_size, "patch_size": model.patch_size}
    shape |= {"in_chans": model.in_chans, "num_classes": model.num_classes}
    mean, std = map(list, channel_statistics(model))
    size = [model.in_chans, model.img_size, model.img_size]
    prepared = {"input_size": size, "interpolation": RESIZED, "crop_pct": 1.0, "crop_mode": "squash"}
    shown = {"pretrained_cfg_overlay": {**prepared, "mean": mean, "std": std}}
    more = {key: value for key, value in model.arguments.items() if key not in STATISTICS}
    if model.name == SMALL:
        small = {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads}
        return {"model_name": "vit_tiny_patch16_224", **shape, **small, **more, **shown}
    return {"model_name": model.name, **shape, **more, **shown}


def build_vit(model: ModelConfig, seed: int = 0) -> VisionTransformer:
    """A fresh network in eval mode. Its weights are drawn from a private stream; load others over them.

    Raises:
        ModelError: no such model, not with these sizes, or no plain vision transformer.
    """
    if model.name != SMALL:
        architecture(model.name)
    return _build(model, seed)


def _build(model: ModelConfig, seed: int, **other: Any) -> VisionTransformer:
    arguments = timm_arguments(model)
    try:
        with seeded_init(seed, "init"):
            vit = timm.create_model(pretrained=False, **arguments | other)
            if model.name == SMALL and "weight_init" not in other:
                _fan_in_init(vit)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        sizes = f"{model.img_size} px, patches of {model.patch_size} px, {model.in_chans} channels"
        raise ModelError(f"timm cannot build model.name = {model.name!r} for {sizes}: {error}") from error
    require_plain(vit, model.name)
    return vit.eval()


def without_numbers(model: ModelConfig) -> VisionTransformer:
    """The network on the meta device, which has shapes only. Nothing is drawn: that would take most of the time."""
    if model.name != SMALL:
        architecture(model.name)
    with torch.device("meta"):
        return _build(model, 0, weight_init="skip")


def vit_of(model: ModelConfig, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """The network around these very tensors, to be asked and not trained: nothing is drawn, and nothing is copied."""
    vit = without_numbers(model)
    vit.load_state_dict(dict(weights), assign=True)
    return vit


@functools.lru_cache(maxsize=16)
def require_token_code(model: ModelConfig) -> None:
    """Raise ModelError unless our forward by tokens gives the logits of the model's own: see `token_difference`."""
    apart = token_difference(model)
    if not apart <= TOLERANCE:
        raise ModelError(
            f"model.name = {model.name!r} answers otherwise when it is run by patches (logits differ by {apart:.2g}); "
            "use a plain ViT or DeiT"
        )


@torch.no_grad()
def token_difference(model: ModelConfig) -> float:
    """How far logits by tokens are from the model's own, of the largest one where that is above 1.

    Two blocks, their parameters drawn, are run on one image of noise.

    Raises:
        ModelError: the model cannot be built, or not be run by tokens.
    """
    shallow = min(SHALLOW, model.depth) if model.name == SMALL else SHALLOW
    vit, rng = _build(model, 0, depth=shallow), stream(0, "token code")
    for parameter in vit.parameters():
        parameter += NOISE * torch.randn(parameter.shape, generator=rng)
    images = torch.randn(1, model.in_chans, model.img_size, model.img_size, generator=rng)
    patches = patchify(images, model.patch_size)
    positions = all_positions(patches)
    try:
        wanted = vit(images)
        found = forward_tokens(vit, patches, positions).cls, forward_cls(vit, patches, positions).logits
        apart: float = max((each - wanted).abs().max().item() for each in found) / max(1.0, wanted.abs().max().item())
    except _MISFITS as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model.name = {model.name!r} cannot be run by patches ({reason}); use a plain ViT or DeiT"
        ) from error
    return apart


def initial_weights(model: ModelConfig, seed: int) -> Weights:
    """The public weights that all clients start from: drawn from `seed`, from the hub, or from a file.

    Where the file has another number of classes, the head keeps its fresh draw; where it has another image size,
    positional embeddings are resampled.

    Raises:
        ModelError: no such model, hub not reachable, or a file that does not fit or has NaN.
    """
    vit = build_vit(model, seed)
    if model.weights != "none":
        _load_pretrained(vit, model)
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def _load_pretrained(vit: VisionTransformer, model: ModelConfig) -> None:
    """Load `model.weights` into `vit`, except a head for another number of classes."""
    source, own = model.weights, vit.state_dict()
    state = _from_hub(model) if source == "timm" else read_weights(Path(source).expanduser())
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ModelError(
                f"model.weights: {name} in {source!r} has NaN or infinity; give weights of a run that did not diverge"
            )
    state, prefix = without_prefix(state, source)
    if prefix:
        say_once(f"model.weights: the names in {source} begin with {prefix!r}, which is left out", logging.INFO)
    state = _fitted(state, vit, model)
    if others := {name for name in state if name.startswith(_OTHER_HEADS) and name not in own}:
        named = ", ".join(sorted(others))
        say_once(f"model.weights: {named} of {source} are of another task and left out", logging.INFO)
    head = {name for name in own if name.startswith("head.")}
    head = {name for name in head if name not in state or state[name].shape != own[name].shape}
    state = {name: tensor for name, tensor in state.items() if name not in others | head}
    wrong = [f"{name} is not in the model" for name in state if name not in own]
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in state if name in own}
    wrong += [f"{name} is {there}, not {here}" for name, (there, here) in shapes.items() if there != here]
    whole = {name: tensor.dtype for name, tensor in state.items() if not tensor.is_floating_point()}
    wrong += [f"{name} has whole numbers ({str(dtype).removeprefix('torch.')})" for name, dtype in whole.items()]
    wrong += [f"{name} is missing" for name in sorted(own.keys() - state.keys() - head)]
    if wrong:
        raise _misfit(model, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
    if head:
        lacks = f"{source} has no head for {model.num_classes} classes"
        say_once(f"model.weights: {lacks}; a fresh one is trained", logging.INFO)
    vit.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)


def _misfit(model: ModelConfig, reason: str) -> ModelError:
    return ModelError(
        f"model.weights: the weights of {model.weights!r} do not fit model.name = {model.name!r}: {reason}"
    )


def _fitted(state: Mapping[str, Tensor], vit: VisionTransformer, model: ModelConfig) -> Weights:
    """The tensors by timm's own names, with positions for this image size and weights for this number of channels.

    Patches of another size are refused, which timm would resample.
    """
    weight = "patch_embed.proj.weight"
    size = vit.patch_embed.proj.weight.shape[-2:]
    if weight in state and state[weight].dim() == 4 and state[weight].shape[-2:] != size:
        other = " x ".join(map(str, state[weight].shape[-2:]))
        raise _misfit(model, f"its patches are {other} px, and model.patch-size = {model.patch_size}")
    try:
        fitted: Weights = dict(checkpoint_filter_fn(dict(state), vit))
        if weight in fitted and fitted[weight].shape[1] != model.in_chans:
            fitted[weight] = adapt_input_conv(model.in_chans, fitted[weight])
    except _MISFITS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _misfit(model, f"timm cannot read them ({reason[:200]})") from error
    return fitted


def _from_hub(model: ModelConfig) -> Weights:
    if model.name == SMALL:
        raise ModelError(f"model.weights = 'timm', but there are none for model.name = {SMALL!r}; name a timm model")
    try:
        return dict(timm.create_model(model.name, pretrained=True).state_dict())
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"cannot fetch the timm weights of {model.name!r} ({reason}); set model.weights to a safetensors file"
        ) from error


@torch.no_grad()
def _fan_in_init(vit: VisionTransformer) -> None:
    """Unit-variance initialisation (std = fan_in^-1/2).

    timm's std of 0.02 suits width 768; at width 64 it shrinks signals and gradients by 6 at each layer.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(vit.pos_embed, std=0.2)
    nn.init.trunc_normal_(vit.cls_token, std=0.2)
