"""The server phase on models that lie in memory or in files: without a run folder, and without any data.

Shapes: K models, M synthetic images of C channels and S x S pixels, n test images, Y classes.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .. import methods
from ..common.compute import threads
from ..common.errors import ConfigError, DataError
from ..common.rng import stream
from ..common.workers import hired
from ..config import Config
from ..config.recipe import WITH_WEIGHTS
from ..data.images import Images
from ..data.layout import found_source
from ..data.shares import server_images
from ..distillation import distil as distillation
from ..distillation.start import settle, start_student
from ..inversion.pool import Pool, join
from ..inversion.scout import quick_images
from ..merging import average as merging
from ..methods.contract import DIVERGED, Fused, Job
from ..methods.fedmitr import synthesise
from ..methods.rounds import Batch, balanced_targets
from ..publish.hub import timm_config
from ..runs.evaluation import BATCH, Evaluation, graded, scores_of
from ..runs.result import accuracy_table
from ..uploads.gate import require_finite
from ..vit.build import Weights, build_vit, vit_of
from .ensemble import Ensemble
from .members import Model, weights_of

log = logging.getLogger("fedmitr")

PER_CLASS = 4  # quick images on which it is seen whether patch tokens name classes
# Share of patch tokens that say what the class token says, below which they were never trained to: measured 0.88 and
# more where they were, 0.44 where not (docs/LOG.md).
AGREEING = 0.75

Test = tuple[Tensor, Tensor] | str | os.PathLike[str]
"""Images (n, C, H, W), uint8 or else normalised and of the model's size, and labels (n,); or a folder with images."""


@dataclass(frozen=True)
class Result:
    """What `fuse` has made."""

    fused: Fused
    config: Config  # every setting that it was made with
    history: list[dict[str, Any]] = field(repr=False)  # what each stage reported, in order
    classes: tuple[str, ...] = ()  # their names, where the test images' folder says them, else their numbers
    accuracy: dict[str, Any] | None = None  # in percent, of the test images, as in result.json; None: there were none

    @property
    def student(self) -> VisionTransformer:
        """The global model, as a network of timm.

        Raises:
            ConfigError: the method keeps several models; `fused.predict` asks them.
        """
        if self.fused.weights is None:
            raise ConfigError(f"method = {self.config.method!r} makes no single model; use result.fused.predict")
        return network(self.config, self.fused.weights)

    @property
    def images(self) -> Pool | None:
        """The synthetic images, where the method makes some."""
        return self.fused.pool

    def table(self) -> str:
        """One row per model, with its accuracy."""
        if self.accuracy is None:
            raise ConfigError("there is no accuracy; give fuse(..., test=(images, labels))")
        return accuracy_table({"method": self.config.method, "accuracy": self.accuracy})

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_file(self.student.state_dict(), path / "model.safetensors")
        about = timm_config(self.config.model, self.classes)
        (path / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return path

    def push_to_hub(self, name: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the same to the repository `name` of the Hugging Face Hub; returns its address."""
        hub = HfApi(token=token)
        hub.create_repo(name, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            return str(hub.upload_folder(repo_id=name, folder_path=self.save_pretrained(folder)))


def fuse(
    models: Sequence[Model],
    *,
    method: str = "fedmitr",
    start: Model | None = None,
    test: Test | None = None,
    **given: Any,
) -> Result:
    """Fuse models that anybody has trained into one, without data.

    Args:
        models: networks of timm, their state dicts, or paths of safetensors files; one architecture, the same classes.
        method: as `fedmitr methods` lists them, or the path of a file.
        start: what the models were trained from, for methods that merge differences from it (`wudi`, `ties`, ...);
            where it is known, FedMITR's student, too, starts from such a merge.
        test: images and labels, or a folder as `data.path`, to know how good the result is; nothing is chosen by them.
        given: as `Ensemble` has it.

    Raises:
        ModelError, ConfigError: as `Ensemble`; or the method needs what there is not.
        RunError: the student diverged.
    """
    ensemble = Ensemble(models, **given)
    config = Config.from_flat({"method": method}, base=ensemble.config)
    methods.load(method)
    try:
        methods.check(config, len(ensemble.uploads))
    except ConfigError as error:
        raise ConfigError(f"{error}; for models that are trained that is too late: choose another method") from error
    own = given.get("settings") or {}
    first = None if start is None else weights_of(start, "start", config.model)
    if first is not None and config.distill.init == "classwise" and "distill.init" not in own:
        config = Config.from_flat({"distill.init": WITH_WEIGHTS["distill.init"]}, base=config)
    history: list[dict[str, Any]] = []
    with threads(config.threads), hired(config.workers, config.ray_address, ensemble.device) as workers:
        unread = tuple(methods.unread(config))
        if config.relabel.mode == "tokens" and not "relabel.mode".startswith(unread) and "relabel.mode" not in own:
            config = _without_untrained_labels(ensemble, config)
        job = Job(
            ensemble.uploads,
            methods.in_force(config),
            ensemble.device,
            lambda **values: history.append(values),
            origin=partial(_unknown_start, config) if first is None else lambda: first,
            workers=workers,
        )
        fused = methods.fuse(job)
        if fused.weights is not None:
            require_finite(fused.weights, DIVERGED, "the student")
        if test is None:
            return Result(fused, job.config, history, tuple(map(str, range(config.model.num_classes))))
        accuracy = _accuracy(ensemble, fused, config, test)
    return Result(fused, job.config, history, tuple(accuracy["per_class"]), accuracy)


def average(models: Sequence[Model], **given: Any) -> VisionTransformer:
    """The mean of the models' weights by their sizes: one-round FedAvg. Arguments as `Ensemble` has them."""
    ensemble = Ensemble(models, **given)
    return network(ensemble.config, merging.average(ensemble.uploads))


def invert(ensemble: Ensemble, targets: Tensor | None = None) -> Pool:
    """Synthetic images of the classes `targets` (M,), by the ensemble's settings `inversion.*`.

    None: `distill.images-per-round` images, all classes equally often but for a remainder.
    """
    config = ensemble.config
    if targets is None:
        targets = balanced_targets(config, stream(config.seed, "targets", 0))
    if targets.dim() != 1 or not 0 <= int(targets.min()) <= int(targets.max()) < config.model.num_classes:
        raise DataError(f"targets must be classes from 0 to {config.model.num_classes - 1}, of shape (M,)")
    task = Batch(partial(synthesise, ensemble.weigher.ensemble, config), config.seed, "inversion", 0)
    batches = enumerate(targets.split(config.inversion.batch_size))
    with threads(config.threads), hired(config.workers, config.ray_address, ensemble.device) as workers:
        return join([pool for _, (pool, _) in workers.in_order(task, batches)])


def distil(ensemble: Ensemble, images: Pool, start: Model | None = None) -> VisionTransformer:
    """One network that has learned from the ensemble on these images, for `distill.epochs-per-round` epochs.

    It starts from `start`; None: as `distill.init` says.
    """
    config = Config.from_flat({"distill.rounds": 1}, base=ensemble.config)
    teachers, wait = ensemble.weigher.ensemble, config.distill.merges_heads and start is None
    if start is not None:
        config = Config.from_flat({"distill.init": "initial"}, base=config)
    student = start_student(ensemble.uploads, config, partial(_unknown_start, config))
    if start is not None:
        student.load_state_dict(weights_of(start, "start", config.model))
    student.to(ensemble.device)
    with threads(config.threads), hired(config.workers, config.ray_address, ensemble.device) as workers:
        if wait:
            settle(student, teachers, images)
        stepper = distillation.student_stepper(student, config, distillation.count_batches(len(images), config))
        rng = stream(config.seed, "distillation", 0)
        distillation.distil(student, teachers, images, config, stepper, rng, workers=workers)
    require_finite(student.state_dict(), DIVERGED, "the student")
    return student.eval()


def network(config: Config, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """A network of its own on the CPU, which may be trained."""
    vit = build_vit(config.model)
    vit.load_state_dict(dict(weights))
    return vit


def _unknown_start(config: Config) -> Weights:
    merges = "distill.init = 'wudi'" if config.distill.init == "wudi" else f"method = {config.method!r}"
    raise ConfigError(
        f"{merges} merges differences from the weights that the models were trained from; give fuse(..., start=), or "
        "--start FILE"
    )


def _without_untrained_labels(ensemble: Ensemble, config: Config) -> Config:
    """With `relabel.mode = none` where patch tokens were never trained to name a class: their labels would be noise."""
    pool = quick_images(ensemble.weigher.ensemble, config, PER_CLASS, stream(config.seed, "agreement"))
    said = ensemble.weigher.ensemble.scores(pool.patches, pool.positions)
    agree = (said.patches.argmax(-1) == said.cls.argmax(-1)[:, None]).float().mean().item()
    if agree >= AGREEING:
        return config
    log.warning(
        "relabel.mode = none: %.0f %% of the patch tokens agree with the class token, so they were not trained to; "
        "train with a loss on patch tokens (docs/fedmitr.md), or set relabel.mode",
        100 * agree,
    )
    return Config.from_flat({"relabel.mode": "none"}, base=config)


def _accuracy(ensemble: Ensemble, fused: Fused, config: Config, test: Test) -> dict[str, Any]:
    """As in result.json, in percent."""
    device, uploads, model = ensemble.device, ensemble.uploads, config.model
    images, labels, classes = _test_images(config, test)

    def graded_by(predict: torch.nn.Module) -> Evaluation:
        predict.to(device).eval()
        if images.dtype == torch.uint8:
            return graded(scores_of(predict, Images(images, labels), model, device), labels, model.num_classes)
        with torch.no_grad():
            scores = [predict(batch.to(device)).float().cpu() for batch in images.split(BATCH)]
        return graded(torch.cat(scores), labels, model.num_classes)

    student = graded_by(fused.predict)
    return {
        "student": student.accuracy,
        "fedavg": graded_by(network(config, merging.average(uploads))).accuracy,
        "ensemble": graded_by(fused.ensemble or ensemble.weigher.ensemble).accuracy,
        "local": [graded_by(vit_of(model, upload.weights)).accuracy for upload in uploads],
        "per_class": dict(zip(classes, student.per_class, strict=True)),
    }


def _test_images(config: Config, test: Test) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The images, their labels, and the classes' names."""
    model = config.model
    if isinstance(test, str | os.PathLike):
        data = found_source(replace(config.data, path=os.fspath(test), source="auto"))
        loaded, classes = server_images(replace(config, data=data))
        return loaded.pixels, loaded.labels, classes
    images, labels = test
    if images.dim() != 4 or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(f"test: images {tuple(images.shape)}, labels {tuple(labels.shape)}; give (n, C, H, W) and (n,)")
    if not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise DataError(
            f"test: labels {int(labels.min())} to {int(labels.max())}, but classes are 0 to {model.num_classes - 1}"
        )
    wanted = (model.in_chans, model.img_size, model.img_size)
    if images.dtype != torch.uint8 and tuple(images.shape[1:]) != wanted:
        raise DataError(f"test: images of {tuple(images.shape[1:])}, but the model takes {wanted}; or give uint8")
    return images.cpu(), labels.long().cpu(), tuple(map(str, range(model.num_classes)))
