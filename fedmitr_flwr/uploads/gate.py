"""The one gate for uploads and the one for models: nothing enters a server phase, and no model is written, past these.

An upload enters where it is trained (`fedmitr run`, `fedmitr bench`), where Flower brings it, and wherever it is read
from a run folder (`fuse`, resume, `bench`). A model is written by every method, by Flower's strategies and by
`central`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..common.errors import DiskError, RunError, UploadError
from ..config import Config, ModelConfig
from ..vit.build import Weights, without_numbers
from ..vit.probe import computes
from .stored import StoredWeights
from .upload import ASK_AGAIN, Upload, validate


@lru_cache(maxsize=4)
def shapes(model: ModelConfig) -> Weights:
    """The model's weights without their numbers; nothing is drawn, and no memory is taken."""
    return dict(without_numbers(model).state_dict())


def admit(upload: Upload, config: Config, *, fingerprint: str | None = None) -> Upload:
    """The upload, if it may enter the ensemble of a run: names, shapes, types, possible numbers, and it computes.

    It is as it was sent or lies on disk, with no more than `config.upload` asks for; `fingerprint` as in `validate`.

    Raises:
        UploadError: "client 3: ..." with what is wrong and the fix.
        DiskError: it cannot be read.
    """
    stored = upload.weights if isinstance(upload.weights, StoredWeights) else None
    if stored is not None:
        try:
            stored.require_unaltered()
        except DiskError:
            raise
        except RunError as error:
            raise UploadError(f"client {upload.client}: {error}; {ASK_AGAIN}") from error
    exact = upload if stored is None else replace(upload, weights=stored.exact)
    validate(exact, shapes(config.model), config, fingerprint)
    # One whose checksum is right has passed here before it was written; the probe takes seconds for a large model.
    proven = stored is not None and stored.has_checksum
    if not proven and not computes(upload.weights, config.model):
        raise UploadError(
            f"client {upload.client}: its model gives NaN or infinity; lower local.lr, and train it again"
        )
    return upload


def require_finite(weights: Mapping[str, Tensor], fix: str, what: str = "the model") -> None:
    """Raise RunError, naming the tensor and the fix, if a number is NaN or infinite."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"{what} diverged: NaN or infinity in {name!r}; {fix}")


def require_model(weights: Mapping[str, Tensor], model: ModelConfig, fix: str) -> None:
    """Raise RunError if these are no weights of a model that computes; they are not to be written then."""
    require_finite(weights, fix)
    if not computes({name: tensor.cpu() for name, tensor in weights.items()}, model):
        raise RunError(f"the model diverged: its answers to noise are NaN or infinity; {fix}")


def require_loss(loss: float, fix: str) -> None:
    """Raise RunError if an evaluation has given no number: accuracies beside it would be of chance."""
    if not math.isfinite(loss):
        raise RunError(f"the model diverged: its loss on the evaluation's images is {loss}; {fix}")
