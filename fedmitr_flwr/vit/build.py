"""Build a timm vision transformer, and the public weights from which every client starts."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import ModelError
from ..rng import seeded_init
from ..training.upload import Weights

SMALL = "small"


def timm_arguments(model: ModelConfig) -> dict[str, Any]:
    """The arguments with which plain `timm.create_model` builds the same network."""
    shape = {"img_size": model.img_size, "patch_size": model.patch_size}
    shape |= {"in_chans": model.in_chans, "num_classes": model.num_classes}
    if model.name == SMALL:
        shape |= {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads}
        return {"model_name": "vit_tiny_patch16_224", **shape}
    return {"model_name": model.name, **shape}


def build_vit(model: ModelConfig, seed: int = 0) -> VisionTransformer:
    """A fresh network in eval mode. Its weights are drawn from a private stream; load others over them."""
    arguments = timm_arguments(model)
    name = arguments["model_name"]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(["vit_*", "deit*"]), n=3)
        hint = f"did you mean {' | '.join(near)}?" if near else "timm.list_models('vit*') lists them"
        raise ModelError(f"model.name = {name!r} is not a timm model; {hint}")
    try:
        with seeded_init(seed, "init"):
            vit = timm.create_model(pretrained=False, **arguments)
            if model.name == SMALL:
                _fan_in_init(vit)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"timm cannot build model.name = {name!r} with {arguments}: {error}") from error
    _require_cls_vit(vit, name)
    return vit.eval()


def vit_of(model: ModelConfig, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """The network around these very tensors, to be asked and not trained: nothing is drawn, and nothing is copied."""
    with torch.device("meta"):
        vit = build_vit(model)
    vit.load_state_dict(dict(weights), assign=True)
    return vit


def initial_weights(model: ModelConfig, seed: int) -> Weights:
    """The public weights that all clients start from: drawn from `seed`, from the hub, or from a file.

    Where the file has another number of classes, the head keeps its fresh draw; where it has another image size,
    positional embeddings are resampled.

    Raises:
        ModelError: no such model, hub not reachable, or a file that does not fit.
    """
    vit = build_vit(model, seed)
    if model.weights != "none":
        load_pretrained(vit, model, model.weights, "model.weights")
    return {name: tensor.clone() for name, tensor in vit.state_dict().items()}


def load_pretrained(vit: VisionTransformer, model: ModelConfig, source: str, key: str) -> None:
    """Load `source` (`timm` or a safetensors file) into `vit`, except a head for another number of classes.

    Raises:
        ModelError: the hub cannot be reached, or the file does not fit; the setting `key`, which named it, is told.
    """
    state = _from_hub(model, key) if source == "timm" else _from_file(Path(source).expanduser(), key)
    state = checkpoint_filter_fn(state, vit)
    weight = "patch_embed.proj.weight"
    if weight in state and state[weight].shape[1] != model.in_chans:
        state[weight] = adapt_input_conv(model.in_chans, state[weight])
    own = vit.state_dict()
    head = {name for name in own if name.startswith("head.") and state.get(name, own[name]).shape != own[name].shape}
    state = {name: tensor.float() for name, tensor in state.items() if name not in head}
    head |= {name for name in own if name.startswith("head.") and name not in state}
    missing = sorted(own.keys() - state.keys() - head)
    wrong = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
        if name in own
        else f"{name} is not in the model"
        for name, tensor in state.items()
        if name not in own or tensor.shape != own[name].shape
    ] + [f"{name} is missing" for name in missing]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelError(f"{key}: the weights of {source!r} do not fit model.name = {model.name!r}: {wrong[0]}{more}")
    vit.load_state_dict(state, strict=False)


def _from_hub(model: ModelConfig, key: str) -> Weights:
    if model.name == SMALL:
        raise ModelError(f"{key} = 'timm', but there are none for model.name = {SMALL!r}; name a timm model")
    try:
        return dict(timm.create_model(model.name, pretrained=True).state_dict())
    except Exception as error:  # the hub's client raises many kinds; all mean the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"cannot fetch the timm weights of {model.name!r} ({reason}); set {key} to a safetensors file"
        ) from error


def _from_file(path: Path, key: str) -> Weights:
    try:
        state: Weights = load_file(path)
        return state
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key}: cannot read {path} as safetensors: {error}") from error


def _require_cls_vit(vit: Any, name: str) -> None:
    """Token dropping and [CLS] importance need a plain ViT whose class token is classified."""
    parts: list[tuple[object, type]] = [(vit, VisionTransformer)]
    if type(vit) is VisionTransformer:
        parts += [(vit.patch_embed, PatchEmbed), *((block, Block) for block in vit.get_submodule("blocks").children())]
    kind = next((type(part).__name__ for part, wanted in parts if type(part) is not wanted), None)
    if kind:
        raise ModelError(
            f"model.name = {name!r} is or has a {kind}; use a plain ViT or DeiT (no distilled, hybrid or Swin one)"
        )
    if vit.global_pool != "token" or vit.cls_token is None or vit.pos_embed is None:
        raise ModelError(
            f"model.name = {name!r} pools by {vit.global_pool!r}; use a ViT with a classified [CLS] token and positions"
        )


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
