"""`fedmitr export`: the model of a run folder as ONNX, for programs that have no PyTorch."""

from importlib.util import find_spec
from pathlib import Path

import torch

from ..common.errors import ConfigError, DiskError, printable
from ..runs.folder import RunFolder
from .hub import timm_config
from .predict import class_names, trained


def export(folder: RunFolder, path: Path) -> str:
    """Write `image` (B, C, S, S), float32 and normalised, to `logits` (B, Y), for any B; gives the lines to print.

    Raises:
        ConfigError: the packages for ONNX are missing, or the file is there already.
        RunError: the folder has no model, or one that is not its own.
        DiskError: the file cannot be written.
    """
    if not all(map(find_spec, ("onnx", "onnxscript"))):
        raise ConfigError(
            "--onnx needs the packages onnx and onnxscript; install them: pip install 'fedmitr-flwr[onnx]'"
        )
    if path.exists():
        raise ConfigError(f"--onnx {path} is there already; name a new file")
    model, network, classes = folder.config.model, trained(folder), class_names(folder)
    # Two, since the exporter takes a size of one to be fixed.
    images = torch.zeros(2, model.in_chans, model.img_size, model.img_size)
    program = torch.onnx.export(
        network.eval(),
        (images,),
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # it is where the exporter writes the file itself
    try:
        program.save(path)
    except OSError as error:
        raise DiskError(f"cannot write {path} ({error.strerror}); name another file") from error
    pixels = timm_config(model, classes)["pretrained_cfg"]
    shown = f"(batch, {model.in_chans}, {model.img_size}, {model.img_size})"
    return "\n".join(
        [
            f"image: float32 {shown}, from 0 to 1, less {pixels['mean']}, divided by {pixels['std']}",
            f"logits: float32 (batch, {len(classes)}), of {printable(', '.join(classes))}",
            f"model: {path}",
        ]
    )
