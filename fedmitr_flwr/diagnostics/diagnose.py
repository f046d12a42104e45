"""All quantities of one run, from its uploads and its pool: `fedmitr diagnose`.

A run has images of one kind, so a dense and a sparse pool are made here, of equal classes and starts, by the run's own
ensemble and steps. Equal seeds give equal figures.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..common.compute import resolve_device, threads, whole_float32
from ..common.errors import RunError, UserError
from ..common.files import load_tensors, write_text
from ..common.rng import stream
from ..config import Config
from ..data.images import prepare
from ..data.shares import server_images
from ..distillation.distil import BATCH
from ..distillation.relabel import relabel
from ..distillation.start import settle, start_student
from ..ensemble.ensemble import Ensemble
from ..inversion.invert import PIXELS, alive_counts, invert
from ..inversion.pool import Pool, join
from ..inversion.scout import Weigher
from ..runs.folder import RunFolder, plain
from ..screening.screen import screen
from ..uploads.upload import Upload
from ..vit.build import vit_of
from ..vit.tokens import all_positions, patchify
from .gap import Shown, gap
from .jitter import input_noise
from .norms import student_norms
from .stability import behind, replace_one
from .table import NAME
from .variance import bias, head_variance

log = logging.getLogger("fedmitr")


@dataclass(frozen=True)
class Sizes:
    """On how much each quantity is measured: two minutes on two cores for five clients on digits."""

    images: int = 96  # in each pool that is made here
    replaced: int = 32  # of them, between two students
    epochs: int = 8  # of these students
    jittered: int = 16  # images on the way of which the input gradient's noise is measured
    draws: int = 8  # of each kind of jitter
    gradients: int = 24  # images of each pool whose gradient by the student's weights is measured
    test: int = 256  # real images, at most


MODES = ("dense", "sparse")
LABELS = ("none", "drop", "tokens")
ARMS = tuple((mode, labels) for mode in MODES for labels in ("none", "tokens"))  # of which students are trained


def diagnose(folder: RunFolder, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Measure, write diagnostics.json into the run's folder, and give what it holds.

    Raises:
        RunError: the run has not ended, or has no pool of synthetic images or no single model.
    """
    excluded = folder.read_result().get("screen", {}).get("excluded", [])
    for path in (folder.pool_path, folder.model_path):
        if not path.exists():
            fix = f"make one that has: fedmitr fuse {folder.root} --method fedmitr"
            raise RunError(f"{folder.path} has no {path.name}, on which claims are measured; {fix}")
    config = methods.in_force(folder.config)
    with folder.locked(), threads(config.threads), whole_float32():
        device = resolve_device(config.device)
        uploads = [upload for upload in folder.require_uploads() if upload.client not in excluded]
        uploads = screen(uploads, config, device, images=0).kept  # what was excluded for its answers is known
        found: dict[str, Any] = plain(_measured(folder, config, uploads, sizes, device))
        write_text(folder.path / NAME, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def _measured(
    folder: RunFolder, config: Config, uploads: Sequence[Upload], sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    pool = _saved_pool(folder, config, device)
    ensemble = _weighed(uploads, pool, config, device)
    students = {"start": start_student(uploads, config).to(device)}
    if config.distill.merges_heads:
        settle(students["start"], ensemble, pool)
    students["end"] = vit_of(config.model, load_tensors(folder.model_path)[0]).to(device)
    test = _test_images(config, sizes.test, device)
    used = asdict(sizes) | {"test": len(test.labels) if test else 0, "steps": config.inversion.steps}
    of_run = {"method": config.method, "mode": config.inversion.mode, "relabel": config.relabel.mode}
    found: dict[str, Any] = {"run": of_run, "sizes": used}

    log.info("diagnose: noise of the input gradient")
    starts = PIXELS.start(sizes.jittered, config.model, stream(config.seed, "diagnostics", "starts")).to(device)
    targets, rng = _classes(sizes.jittered, config).to(device), stream(config.seed, "diagnostics", "jitter")
    found["input_noise"] = input_noise(ensemble, config, starts, targets, sizes.draws, rng)

    log.info("diagnose: a dense and a sparse pool of %d images", sizes.images + sizes.replaced)
    made = {mode: _images(ensemble, config, mode, sizes.images, "pool") for mode in MODES}
    others = {mode: _images(ensemble, config, mode, sizes.replaced, "others") for mode in MODES}
    pools = {(mode, labels): relabel(made[mode], labels) for mode in MODES for labels in LABELS}

    log.info("diagnose: gradients of the student")
    some = torch.randperm(len(pool), generator=stream(config.seed, "diagnostics", "run"))[: sizes.images].to(device)
    cells = {" ".join(names): cell for names, cell in pools.items()} | {"run": pool.rows(some)}
    found["student_gradients"], found["head_variance"] = {}, {}
    for at, student in students.items():
        lengths = {name: student_norms(student, ensemble, cell, sizes.gradients) for name, cell in cells.items()}
        found["student_gradients"][at] = lengths
        found["head_variance"][at] = {name: head_variance(student, ensemble, cell) for name, cell in cells.items()}
    if test:
        kept = alive_counts(config.model.num_patches, config.inversion)[-1]
        found["relabel_bias"] = {at: bias(student, ensemble, test, kept) for at, student in students.items()}

    log.info("diagnose: students whose pools differ in %d of %d images", sizes.replaced, sizes.images)
    on_test = {"test": test} if test else {}
    found["stability"] = {}
    found["gap"] = {"run": gap(students["end"], {"pool": Shown.of(pool), **on_test})}
    for mode, labels in ARMS:
        own, arm = pools[mode, labels], f"{mode} {labels}"
        probes = {"pool": Shown.of(behind(own, sizes.replaced)), **on_test}
        given = students["start"], ensemble, own, relabel(others[mode], labels), config, sizes.epochs, probes
        student, found["stability"][arm] = replace_one(*given)
        found["gap"][arm] = gap(student, {"pool": Shown.of(own), **on_test})
    return found


def _saved_pool(folder: RunFolder, config: Config, device: torch.device) -> Pool:
    tensors, patch = load_tensors(folder.pool_path)[0], config.model.patch_size
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        return Pool(patches=patchify(tensors.pop("images"), patch), **tensors, patch=patch)
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder.pool_path} is of another version; fuse the run again ({error})") from error


def _weighed(uploads: Sequence[Upload], pool: Pool, config: Config, device: torch.device) -> Ensemble:
    """The run's ensemble, weighted by its whole pool."""
    weigher = Weigher(uploads, config, device)
    seen = pool.canvases() if config.inversion.images_each > 1 else pool
    weigher.refine(seen.images, seen.targets)
    return weigher.ensemble


def _classes(count: int, config: Config) -> Tensor:
    return torch.arange(count) % config.model.num_classes


def _images(ensemble: Ensemble, config: Config, mode: str, count: int, purpose: str) -> Pool:
    """Images whose density is known and that are not relabelled yet; equal starts in every mode."""
    inversion, flip = replace(config.inversion, mode=mode), config.data.flips
    rng = stream(config.seed, "diagnostics", purpose)
    chunks = _classes(count, config).split(BATCH)
    made = [invert(ensemble, each, inversion, config.model, flip=flip, rng=rng) for each in chunks]
    return join(made).require_finite()


def _test_images(config: Config, most: int, device: torch.device) -> Shown | None:
    """Some of the server's test images; None where it has none, or they cannot be read now."""
    if config.evaluate.where != "server":
        return None
    try:
        images = server_images(config)[0]
    except UserError as error:
        log.warning("diagnose: without test images: %s", error)
        return None
    order = torch.randperm(len(images), generator=stream(config.seed, "diagnostics", "test"))
    chosen = images.subset(order[:most])
    patches = patchify(prepare(chosen.pixels.to(device), config.model), config.model.patch_size)
    return Shown(patches, all_positions(patches), chosen.labels.to(device))
