"""What FedMITR and its data-free rivals share: make images, weigh the teachers, distil; E times, on a pool that grows.

A method says how its images are made (`Recipe`). Batches of images and the student are kept on disk as they are
finished, so that a run that was killed goes on behind them.
"""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from threading import Event
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..common.compute import as_made, side_by_side
from ..common.progress import Progress, Series
from ..common.rng import stream
from ..config import Config
from ..distillation.distil import Perturb, count_batches, distil
from ..distillation.ema import Ema
from ..distillation.losses import Parts
from ..distillation.pool import Pool, join
from ..distillation.relabel import answered, relabel
from ..distillation.start import settle, start_student
from ..ensemble.ensemble import Ensemble
from ..ensemble.routing import route
from ..inversion.result import Inverted
from ..inversion.scout import FROM_IMAGES, Weigher
from ..inversion.trajectory import OnStep
from ..uploads.gate import require_finite
from ..vit.optim import Stepper
from .contract import DIVERGED, Fused, Job, Stopwatch

log = logging.getLogger("fedmitr")

# Settings that decide a batch of images, and a student, given the uploads: under others a checkpoint is of no use.
IMAGE_SETTINGS = (
    *("seed", "data.flip", "model.", "ensemble.", "statistics.", "inversion.", "relabel.", "rival."),
    "distill.images-per-epoch",
)
STUDENT_SETTINGS = (*IMAGE_SETTINGS, "distill.")

# (ensemble, student, targets, config, random stream, what to call after each step) -> images of these targets
Make = Callable[[Ensemble, VisionTransformer, Tensor, Config, torch.Generator, OnStep], Inverted]


@dataclass(frozen=True)
class Recipe:
    """What tells one method from another.

    Attributes:
        make: one batch of images.
        steps: that `make` takes.
        by_student: do the images depend on the student that they find?
        learns: are the teachers' weights learned, whatever `ensemble.weights` says?
        perturb: what distillation does to a batch of patches before anyone sees it; None: nothing.
        stage: the name of making images, in metrics, seconds and on the progress bar.
        rate: the setting that is its learning rate.
    """

    make: Make
    steps: int
    by_student: bool = False
    learns: bool = False
    perturb: Perturb | None = None
    stage: str = "inversion"
    rate: str = "inversion.lr"


def plain(config: Config) -> Config:
    """Settings under which distillation is that of the rivals: only T² KL of the class tokens of whole, unmixed images.

    T is `rival.temperature`, and the ensemble teaches what it decides. Nothing is relabelled; patch tokens and
    pseudo-labels have no weight. Fitted or merged layers are FedMITR's own: rivals start from the average.
    """
    forced: dict[str, object] = {"inversion.mode": "dense"}  # `pri` makes fewer targets of as many images
    forced |= {"relabel.mode": "none", "distill.mix": "none", "distill.keep": 1.0}
    forced |= {"distill.high": 0.0, "distill.low": 0.0, "distill.kd": 1.0}
    forced |= {"distill.soft": "kl", "distill.temperature": config.rival.temperature}
    forced |= {"ensemble.teach": config.ensemble.combine}
    forced |= {"distill.init": "average"} if config.distill.merges else {}
    return Config.from_flat(forced, base=config)


def grow(job: Job, recipe: Recipe) -> Fused:
    """Make images, distil the ensemble on all that there are; E times."""
    config = job.config
    weigher = Weigher(job.uploads, config, job.device, learns=recipe.learns)
    ensemble = weigher.ensemble
    if weigher.how == "estimated":
        with job.stopwatch.stage("inversion"):
            weigher.scout()
    student = start_student(job.uploads, config).to(job.device)
    pools: list[Pool] = []
    reads_cached = config.distill.teachers == "cached" or config.distill.start_needs_images
    stepper: Stepper | None = None
    ema = Ema(config.distill.ema)
    done = 0
    for epoch in range(config.distill.epochs):
        made = make_images(ensemble, student, epoch, recipe, job)
        pool = join(pools + made)
        weigher.refine(*_canvases(pool, config), epoch)
        if reads_cached and weigher.how in FROM_IMAGES:  # the weights are others now: soft labels are of these
            pool = replace(pool, views=tuple(answered(view, pool.images, ensemble) for view in pool.views))
        pools = [pool]
        if weigher.how == "learned":
            job.log(stage="weights", epoch=epoch, weights=ensemble.weights[:, 0])
        if stepper is None:
            stepper = Stepper(
                student.parameters(), config.distill.optimizer, config.distill.lr, count_batches(pool.views, config)
            )
            done = _restore(student, stepper, ema, recipe, job)
            if config.distill.start_needs_images and not done:
                with job.stopwatch.stage("distillation"):
                    told = settle(student, ensemble, pool, config)
                job.log(stage="start", **told)
        if epoch >= done:
            with job.stopwatch.stage("distillation"):
                _distil(student, ensemble, pool, stepper, ema, epoch, recipe, job)
            require_finite(student.state_dict(), DIVERGED, "the student")
            _keep(student, stepper, ema, epoch + 1, job)
    ema.write(student)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    return Fused(student, weights, pool, ensemble)


def _canvases(pool: Pool, config: Config) -> tuple[Tensor, Tensor]:
    """Images and targets, each canvas once: all `pri` images of one share its pixels, whatever order they come in."""
    if config.inversion.mode != "pri":
        return pool.images, pool.targets
    first: dict[bytes, int] = {}
    for row, image in enumerate(pool.images.cpu()):
        first.setdefault(image.numpy().tobytes(), row)
    rows = list(first.values())
    return pool.images[rows], pool.targets[rows]


def make_images(ensemble: Ensemble, student: VisionTransformer, epoch: int, recipe: Recipe, job: Job) -> list[Pool]:
    """Make and relabel one epoch's images, batches side by side; batches of an earlier start are taken back."""
    config = job.config
    chunks = dict(enumerate(_targets(epoch, config)))
    pools = {number: pool for number in chunks if (pool := _kept_batch(epoch, number, recipe, job)) is not None}
    missing = {number: chunk for number, chunk in chunks.items() if number not in pools}
    if missing:
        label = f"{recipe.stage} {epoch + 1}/{config.distill.epochs}"
        total = recipe.steps * sum(map(len, missing.values()))
        workers = len(chunks) if ensemble.by_many else 1  # also if few are missing: sums are split by thread
        with Progress(label, total, unit="img·step") as progress, side_by_side(workers) as at_once:

            def make(number: int, over: Event) -> _Made:
                return _make_batch(ensemble, student, missing[number], (epoch, number), recipe, progress, over, config)

            with closing(as_made(make, missing, at_once)) as batches:
                for _ in missing:
                    watch = Stopwatch()
                    with watch.stage(recipe.stage):  # until the next one is there: the sum of these is the whole time
                        number, made = next(batches)
                    pools[number] = _relabelled(made, ensemble, (epoch, number), watch, recipe, job)
    return [pools[number] for number in chunks]


def _targets(epoch: int, config: Config) -> tuple[Tensor, ...]:
    """Of each batch of an epoch."""
    targets = balanced_targets(config, stream(config.seed, "targets", epoch))
    chunks: tuple[Tensor, ...] = targets.split(config.inversion.batch_size)
    return chunks


def balanced_targets(config: Config, rng: torch.Generator) -> Tensor:
    """One epoch's classes, all equally often but for a remainder, in random order, or, with routing, in theirs [M].

    `pri` makes several images of each target, so it gets as many fewer.
    """
    per_target = config.inversion.rebirths if config.inversion.mode == "pri" else 1
    count = -(-config.distill.images_per_epoch // per_target)
    classes = config.model.num_classes
    every = torch.arange(count) % classes
    offset = torch.randint(classes, (1,), generator=rng)  # the remainder is not always of the first classes
    targets = ((every + offset) % classes)[torch.randperm(count, generator=rng)]
    # Where images go to the teachers of their class, batches of few classes leave most teachers out altogether.
    return targets.sort().values if config.inversion.route else targets


class _Made(NamedTuple):
    images: Inverted
    targets: Tensor
    series: Series  # loss and alive share, by step


def _make_batch(
    ensemble: Ensemble,
    student: VisionTransformer,
    targets: Tensor,
    place: tuple[int, int],
    recipe: Recipe,
    progress: Progress,
    over: Event,
    config: Config,
) -> _Made:
    """One batch; its `place` is (epoch, number)."""
    series = Series()

    def on_step(loss: float, alive: float) -> None:
        if over.is_set():
            raise InterruptedError("another batch has failed, or the run was interrupted")
        series.add(loss=loss, alive=alive)
        progress.update(len(targets), loss=loss, alive=alive)

    rng = stream(config.seed, recipe.stage, *place)
    return _Made(recipe.make(ensemble, student, targets, config, rng, on_step), targets, series)


def _relabelled(
    made: _Made, ensemble: Ensemble, place: tuple[int, int], watch: Stopwatch, recipe: Recipe, job: Job
) -> Pool:
    """The batch with its labels, kept on disk."""
    config, inverted = job.config, made.images.require_finite(recipe.rate)
    with watch.stage("relabelling"):
        pool = Pool.of(inverted, relabel(ensemble, inverted, config.relabel))
    job.stopwatch.add(watch.seconds)
    epoch, number = place
    alive = inverted.alive.float().mean().item()
    asked = route(ensemble.weights, made.targets.to(job.device), config.inversion.route).share
    loss = inverted.loss.mean().item()
    told = {"loss": loss, "alive": alive, "teachers_asked": asked, "curve": made.series.thin()}
    job.log(stage=recipe.stage, epoch=epoch, batch=number, **told)
    facts = {"soft": pool.soft, "seconds": watch.seconds}
    job.checkpoints.save(_name(*place), _image_settings(recipe), pool.tensors(), **facts)
    return pool


def _kept_batch(epoch: int, number: int, recipe: Recipe, job: Job) -> Pool | None:
    kept = job.checkpoints.load(_name(epoch, number), _image_settings(recipe))
    if kept is None:
        return None
    tensors, facts = kept
    job.stopwatch.add(facts["seconds"])
    told = f"{recipe.stage} {epoch + 1}/{job.config.distill.epochs}"
    log.info("%s: batch %d is of an earlier start", told, number + 1)
    return Pool.of_tensors({name: tensor.to(job.device) for name, tensor in tensors.items()}, facts["soft"])


def _name(epoch: int, number: int) -> str:
    return f"images-{epoch}-{number}"


def _image_settings(recipe: Recipe) -> tuple[str, ...]:
    return STUDENT_SETTINGS if recipe.by_student else IMAGE_SETTINGS


def _distil(
    student: VisionTransformer,
    ensemble: Ensemble,
    pool: Pool,
    stepper: Stepper,
    ema: Ema,
    epoch: int,
    recipe: Recipe,
    job: Job,
) -> None:
    config = job.config
    label = f"distillation {epoch + 1}/{config.distill.epochs}"
    images = config.distill.passes * sum(len(view) for view in pool.views)
    series, alive = Series(), pool.alive.float().mean().item()
    with Progress(label, total=images, unit="img") as progress:

        def on_batch(count: int, parts: Parts) -> None:
            loss, *values = torch.stack([parts.total(config.distill), *parts]).tolist()  # a GPU is waited for once
            series.add(**dict(zip(parts._fields, values, strict=True)))
            progress.update(count, loss=loss, alive=alive)

        rng = stream(config.seed, "distillation", epoch)
        distil(student, ensemble, pool, config, stepper, rng, on_batch=on_batch, ema=ema, perturb=recipe.perturb)
    job.log(stage="distillation", epoch=epoch, **series.means(), curve=series.thin())


def _keep(student: nn.Module, stepper: Stepper, ema: Ema, epochs: int, job: Job) -> None:
    tensors = {f"student/{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"stepper/{name}": tensor for name, tensor in stepper.state().items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in ema.state().items()}
    seconds = {"distillation": job.stopwatch.seconds["distillation"]}
    job.checkpoints.save("student", STUDENT_SETTINGS, tensors, epochs=epochs, seconds=seconds)


def _restore(student: nn.Module, stepper: Stepper, ema: Ema, recipe: Recipe, job: Job) -> int:
    """Put the student where an earlier start left it; returns how many epochs of distillation are behind it.

    Images that depend on the student need the one of their own epoch: if a batch of an earlier epoch is lost, the
    student starts again as well.
    """
    kept = job.checkpoints.load("student", STUDENT_SETTINGS)
    if kept is None:
        return 0
    tensors, facts = kept
    epochs: int = facts["epochs"]
    if recipe.by_student:
        numbers = {epoch: range(len(_targets(epoch, job.config))) for epoch in range(epochs)}
        earlier = [_name(epoch, number) for epoch in numbers for number in numbers[epoch]]
        if not all(job.checkpoints.has(name, _image_settings(recipe)) for name in earlier):
            return 0
    student.load_state_dict(_under("student/", tensors))
    stepper.restore(_under("stepper/", tensors))
    ema.restore(_under("ema/", tensors), student)
    job.stopwatch.add(facts["seconds"])
    log.info("distillation: %d of %d epochs are of an earlier start", epochs, job.config.distill.epochs)
    return epochs


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
