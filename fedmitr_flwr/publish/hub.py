"""The files beside model.safetensors, in timm's and the Hugging Face Hub's own form: config.json and README.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from ..runs.folder import RunFolder
from ..uploads.stored import StoredWeights
from ..vit.build import timm_arguments, without_numbers
from .card import card


def save_model(folder: RunFolder, weights: Mapping[str, Tensor], classes: Sequence[str]) -> None:
    """Write model.safetensors and config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` works.

    A model on taps is not timm's: `vit.taps.load_model` reads it from the same files.

    Raises:
        RunError: a number is NaN or infinite.
    """
    folder.save_model(weights, timm_config(folder.config.model, classes))


def write_result(folder: RunFolder, result: Mapping[str, Any], *, central: bool = False) -> None:
    """Write result.json, and before it, where there is a model, its card; a `central` one is of all clients' images."""
    if folder.model_path.exists():
        plain = "cls_token" in StoredWeights(folder.model_path)
        folder.write_card(card(result, folder.path.name, central=central, plain=plain))
    folder.write_result(result)


def timm_config(model: ModelConfig, classes: Sequence[str]) -> dict[str, Any]:
    """What timm's own `save_for_hf` writes, without what it says of published weights, such as their licence.

    `pretrained_cfg` says how pixels become input: `timm.data.create_transform` squashes images to the model's size.
    """
    arguments = timm_arguments(model)
    architecture, shown = arguments.pop("model_name"), arguments.pop("pretrained_cfg_overlay")
    fixed = without_numbers(model).patch_embed.strict_img_size
    parts = {"first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": architecture.partition(".")[0],
        "num_classes": model.num_classes,
        "global_pool": "token",
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {**shown, "num_classes": model.num_classes, "fixed_input_size": fixed, **parts},
    }
