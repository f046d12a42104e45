"""What a run has left, to go on with in Python."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..common.errors import RunError
from ..common.files import load_tensors
from ..config import Config
from ..runs.folder import RunFolder
from ..vit.build import vit_of
from ..vit.taps import network_of


class Run:
    """A finished run folder, or a fusion's in it, which is only read."""

    def __init__(self, path: str | Path) -> None:
        """Raise RunError where the folder is none, or its settings cannot be read."""
        self._folder = RunFolder.open(Path(path).expanduser())

    @property
    def config(self) -> Config:
        return self._folder.config

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json."""
        return self._folder.read_result()

    def model(self) -> nn.Module:
        """The global model, in eval mode."""
        if not self._folder.model_path.exists():
            raise RunError(f"{self._folder.path} has no model: it has not ended, or its method keeps several")
        return network_of(self.config.model, load_tensors(self._folder.model_path)[0])

    def uploads(self) -> list[VisionTransformer]:
        """Each client's model, in order: `fuse(run.uploads(), sizes=run.sizes)` goes on from here."""
        return [vit_of(self.config.model, upload.weights) for upload in self._folder.load_uploads()]

    @property
    def sizes(self) -> list[int]:
        """Each client's number of training images."""
        return [upload.num_examples for upload in self._folder.load_uploads()]

    def images(self) -> dict[str, Tensor]:
        """The synthetic images (M, C, S, S), normalised, and what is known of each; empty where there are none."""
        path = self._folder.pool_path
        return load_tensors(path)[0] if path.exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one for each batch of images, round of distillation, and so on."""
        path = self._folder.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
