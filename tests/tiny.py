"""Tiny settings, models, uploads and images for the tests of the core. Every setting that matters is set here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config, ModelConfig
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.methods.contract import Fused, Job, Stopwatch
from fedmitr_flwr.report import figures
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import build_vit
from fedmitr_flwr.vit.optim import Stepper

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
_TINY: dict[str, object] = {
    "method": "fedmitr",
    "device": "cpu",
    "threads": 1,
    "data.source": "digits",
    "data.train-limit": 60,
    "data.test-limit": 30,
    "data.flip": "false",
    "partition.scheme": "iid",
    "partition.min-size": 5,
    "partition.clients": 2,
    "model.name": "small",
    "model.img-size": 8,
    "model.patch-size": 2,  # 16 patches
    "model.in-chans": 1,
    "model.num-classes": 10,
    "model.width": 16,
    "model.depth": 2,
    "model.weights": "none",
    "local.epochs": 1,
    "local.batch-size": 16,
    "local.optimizer": "adamw",
    "local.lr": 1e-3,
    "local.augment": True,
    "local.outliers": 0.0,
    "local.threads": 1,
    "upload.dtype": "float32",
    "upload.extras": "",
    "screen.mode": "off",
    "ensemble.combine": "logits",
    "ensemble.weights": "size",
    "inversion.mode": "sparse",
    "inversion.steps": 8,
    "inversion.batch-size": 10,
    "inversion.stops": "0.25,0.5",
    "relabel.mode": "tokens",
    "distill.rounds": 1,
    "distill.images-per-round": 10,
    "distill.epochs-per-round": 1,
    "distill.init": "average",
    "distill.lr": 1e-3,
    "evaluate.where": "server",
    "flower.quorum": 1.0,
}


def settings(**changes: object) -> Config:
    """The head learns as fast as the rest, unless a test says otherwise."""
    alike = {"local.head-lr": changes.get("local.lr", _TINY["local.lr"])}
    return Config.from_flat(_TINY | alike | changes)


# What training from scratch needs, where nothing resolves it.
RECIPE: dict[str, object] = {
    "data.flip": "false",
    "local.epochs": 1,
    "local.optimizer": "muon",
    "local.lr": 3e-3,
    "local.head-lr": 3e-3,
    "inversion.stops": "0.1,0.3",
    "distill.init": "average",
    "distill.epochs-per-round": 1,
    "distill.lr": 3e-3,
}
# Of `small`, where a test parses settings that nothing resolves.
SIZES: dict[str, object] = {"model.img-size": 8, "model.patch-size": 2, "model.in-chans": 1}


def small(img_size: int = 8, in_chans: int = 1, num_classes: int = 10) -> ModelConfig:
    """What says how pixels become its input, and how many classes there are."""
    return ModelConfig(img_size=img_size, in_chans=in_chans, num_classes=num_classes)


class Sgd(Stepper):
    """Plain gradient steps, without weight decay and clipping, for a test that must see the gradients."""

    def __init__(self, student: VisionTransformer, lr: float, total_steps: int) -> None:
        super().__init__(student.parameters(), "sgd", lr or 1.0, total_steps)
        for group in self.optimizers[0].param_groups:
            group["weight_decay"] = 0.0
        if not lr:
            self.schedules = [LambdaLR(each, lambda _: 0.0) for each in self.optimizers]

    def step(self, loss: torch.Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        self.advance()


def a_vit(config: Config, seed: int) -> VisionTransformer:
    """A network of which every parameter counts: fresh biases are 0, norms 1 and DeiT-3's layer scales 1e-6."""
    vit = build_vit(config.model, seed)
    rng = stream(seed, "noise")
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return vit


def an_upload(
    config: Config, client: int, num_examples: int = 10, counts: tuple[int, ...] | None = None, seed: int | None = None
) -> Upload:
    vit = a_vit(config, client if seed is None else seed)
    weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    return Upload(client, weights, num_examples, 0.5, "c" * 12, counts)


def two_uploads(config: Config | None = None) -> list[Upload]:
    """Of 10 and 30 images."""
    return [an_upload(config or settings(), client, 10 + 20 * client) for client in range(2)]


def an_ensemble(config: Config, teachers: int = 2) -> Ensemble:
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(teachers)]
    return Ensemble.of(uploads, config.model, config.ensemble)


def some_images(config: Config, count: int, seed: int = 0) -> Tensor:
    """(count, C, S, S) of normal noise."""
    model = config.model
    return torch.randn(count, model.in_chans, model.img_size, model.img_size, generator=stream(seed, "images"))


def fused(
    config: Config,
    uploads: Sequence[Upload] = (),
    lines: list[dict[str, Any]] | None = None,
    stopwatch: Stopwatch | None = None,
) -> Fused:
    """By `config.method`, of `two_uploads` unless others are given; `lines` gets what is logged."""
    of = uploads or two_uploads(config)
    log = [] if lines is None else lines
    job = Job(of, config, torch.device("cpu"), lambda **values: log.append(values), stopwatch or Stopwatch())
    return methods.fuse(job)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same tensors, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def timeless(path: Path) -> object:
    """Everything in a safetensors file, to the bit, but the seconds that a client's training took."""
    tensors, header = load_tensors(path)
    header.pop("seconds", None)
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}, header


def contents(run: RunFolder) -> list[object]:
    """All uploads of a run, its model and its pool, if there is one."""
    pools = [run.pool_path] if run.pool_path.exists() else []
    return [timeless(path) for path in (*run.upload_paths().values(), run.model_path, *pools)]


def draw(patch: pytest.MonkeyPatch) -> None:
    """Pictures of runs are drawn, as they are not elsewhere (conftest.py)."""
    for save in (figures.save_images, figures.save_partition):
        patch.setattr(pipeline, save.__name__, save)
