"""What the figures of FedMITR and its data-free rivals leave out: checkpoints, progress, batches in parallel.

A method's rounds make images, weigh the teachers, distil. Batches of images and the student are kept on disk as they
are finished, so that a run that was killed goes on behind them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.compute import side_by_side
from ..common.progress import Progress, Series
from ..common.rng import stream
from ..common.workers import Report
from ..config import Config
from ..distillation.distil import Plain, count_batches, distil, student_stepper
from ..distillation.losses import Parts
from ..distillation.start import settle, start_student
from ..ensemble.routing import route
from ..inversion.invert import PIXELS, Pixels
from ..inversion.pool import Pool, join
from ..inversion.scout import Weigher
from ..inversion.trajectory import OnStep
from ..uploads.gate import require_finite
from ..vit.optim import Stepper
from .contract import DIVERGED, Fused, Job, Stopwatch

log = logging.getLogger("fedmitr")

# Settings that decide a batch of images, and a student, given the uploads: under others a checkpoint is of no use.
IMAGE_SETTINGS = ("seed", "data.flip", "model.", "ensemble.", "inversion.", "relabel.", "distill.images-per-round")
SCOUT_SETTINGS = ("seed", "data.flip", "model.", "ensemble.", "inversion.batch-size", "inversion.prior")
STUDENT_SETTINGS = (*IMAGE_SETTINGS, "distill.")

GLIMPSES = 10  # of the student in each round, at most

# (targets, random stream, what to call after each step) -> images of these targets, with their labels
Make = Callable[[Tensor, torch.Generator, OnStep], Pool]


def rival_settings(config: Config) -> Config:
    """Nothing of FedMITR's own: whole images of which nothing is relabelled, and a student that starts as average."""
    forced = {"inversion.mode": "dense", "relabel.mode": "none"}  # `pri4` makes fewer targets of as many images
    forced |= {"distill.init": "average"} if config.distill.merges else {}
    return Config.from_flat(forced, base=config)


class Rounds:
    """The rounds r = 0, 1, ... of one method, in which teachers make images and a student learns from them.

    Attributes:
        student: starts as the settings say, and is trained by `distil`.
        pool: all images so far.
    """

    def __init__(
        self, job: Job, teachers: Weigher, steps: int, stage: str = "inversion", *, by_student: bool = False
    ) -> None:
        """Start the student; nothing is computed yet.

        Args:
            job: the uploads and the settings.
            teachers: the ensemble, and how it is weighed.
            steps: that making a batch of images takes.
            stage: the name of making images, in metrics, seconds and on the progress bar.
            by_student: do the images depend on the student that they find?
        """
        self.student = start_student(job.uploads, job.config, job.origin).to(job.device)
        self.pool: Pool | None = None
        self._job, self._teachers, self._steps, self._stage = job, teachers, steps, stage
        self._image_settings = STUDENT_SETTINGS if by_student else IMAGE_SETTINGS
        self._by_student = by_student
        self._stepper: Stepper | None = None
        self._done = 0  # rounds of distillation that an earlier start had finished

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._job.config.distill.rounds))

    def scout(self, pixels: Pixels = PIXELS) -> None:
        """Weigh the teachers by a few quick images, where their weights are estimated."""
        if not self._teachers.estimates:
            return
        job, ensemble, watch = self._job, self._teachers.ensemble, Stopwatch()
        kept = job.in_common.load("scouting", SCOUT_SETTINGS) if pixels is PIXELS else None
        if kept:
            ensemble.weights = kept[0]["weights"].to(job.device)
            watch.add(kept[1])
        else:
            with watch.stage("scouting"):
                self._teachers.scout(pixels)
            if pixels is PIXELS:
                job.in_common.save("scouting", SCOUT_SETTINGS, {"weights": ensemble.weights}, **watch.seconds)
        job.stopwatch.add(watch.seconds)

    def images(self, r: int, make: Make) -> Pool:
        """Add one round's images to the pool, batches side by side; those of an earlier start are taken back.

        Returns:
            All images so far.
        """
        config = self._job.config
        chunks = dict(enumerate(_targets(r, config)))
        pools = {number: pool for number in chunks if (pool := self._kept_batch(r, number)) is not None}
        missing = {number: chunk for number, chunk in chunks.items() if number not in pools}
        if missing:
            total = self._steps * sum(map(len, missing.values()))
            # Also if few are missing: sums are split by thread.
            jobs = len(chunks) if self._teachers.ensemble.by_many else 1
            items = {number: (number, chunk) for number, chunk in missing.items()}
            task = Batch(make, config.seed, self._stage, r)
            with (
                Progress(self._label(self._stage, r), total, unit="image steps") as progress,
                side_by_side(jobs) as at_once,
                closing(self._job.workers.as_made(task, items, at_once, progress.update)) as batches,
            ):
                for _ in missing:
                    watch = Stopwatch()
                    with watch.stage(self._stage):  # until the next is there: the sum of these is the whole time
                        number, (pools[number], series) = next(batches)
                    self._keep_batch(r, number, pools[number], series, watch.seconds)
        self.pool = join([*([self.pool] if self.pool else []), *(pools[number] for number in chunks)])
        return self.pool

    def weigh(self) -> None:
        """Weigh the teachers anew by all images so far, where their weights are estimated."""
        assert self.pool is not None, "images come first"
        pool = self.pool.canvases() if self._job.config.inversion.images_each > 1 else self.pool
        self._teachers.refine(pool.images, pool.targets)

    def distil(self, r: int, plain: Plain | None = None) -> None:
        """Train the student on all images so far, unless an earlier start has; `plain` is the rivals' distillation."""
        job, student, pool = self._job, self.student, self.pool
        assert pool is not None, "images come first"
        if self._stepper is None:
            self._stepper = student_stepper(student, job.config, count_batches(len(pool), job.config))
            self._done = self._restore(self._stepper)
            if job.config.distill.merges_heads and not self._done:
                with job.stopwatch.stage("distillation"):
                    found = settle(student, self._teachers.ensemble, pool)
                job.log(stage="start", **found)
        if r >= self._done:
            with job.stopwatch.stage("distillation"):
                self._train(r, pool, self._stepper, plain)
            require_finite(student.state_dict(), DIVERGED, "the student")
            self._keep(self._stepper, r + 1)

    def fused(self) -> Fused:
        """The student as the global model."""
        return Fused.of_student(self.student, self._teachers.ensemble, self.pool)

    def _label(self, stage: str, r: int) -> str:
        return f"{stage} {r + 1}/{self._job.config.distill.rounds}"

    def _train(self, r: int, pool: Pool, stepper: Stepper, plain: Plain | None) -> None:
        job, config = self._job, self._job.config
        epochs, seen = config.distill.epochs_per_round, 0
        shown = {round(epochs * part / GLIMPSES) for part in range(1, GLIMPSES + 1)} - {0} if job.judge else set()
        series = Series()
        with Progress(self._label("distillation", r), total=epochs * len(pool), unit="images") as progress:

            def on_batch(count: int, parts: Parts) -> None:
                nonlocal seen
                loss, *values = torch.stack([parts.total(), *parts]).tolist()  # a GPU is waited for once
                series.add(**dict(zip(parts._fields, values, strict=True)))
                progress.update(count, loss=loss)
                seen += count
                epoch, rest = divmod(seen, len(pool))
                if job.judge and not rest and epoch in shown:
                    with job.stopwatch.aside("evaluation", "distillation"):
                        accuracy = job.judge(self.student)
                        self.student.train()
                    progress.update(0, accuracy=accuracy)
                    job.log(stage="student", round=r, epoch=epoch, accuracy=accuracy)

            rng = stream(config.seed, "distillation", r)
            teachers, workers = self._teachers.ensemble, job.workers
            distil(self.student, teachers, pool, config, stepper, rng, on_batch, plain, workers)
        job.log(stage="distillation", round=r, **series.means(), curve=series.thin())

    def _keep_batch(self, r: int, number: int, batch: Pool, series: Series, seconds: dict[str, float]) -> None:
        job = self._job
        job.stopwatch.add(seconds)
        means = {"loss": batch.loss.mean().item(), "alive": batch.alive.float().mean().item()}
        routing = route(self._teachers.ensemble.weights, batch.targets, job.config.inversion.route)
        means["teachers_asked"] = routing.share
        job.log(stage=self._stage, round=r, batch=number, **means, curve=series.thin())
        job.checkpoints.save(_name(r, number), self._image_settings, batch.tensors(), seconds=seconds)

    def _kept_batch(self, r: int, number: int) -> Pool | None:
        job = self._job
        kept = job.checkpoints.load(_name(r, number), self._image_settings)
        if kept is None:
            return None
        tensors, facts = kept
        job.stopwatch.add(facts["seconds"])
        log.info("%s: batch %d is of an earlier start", self._label(self._stage, r), number + 1)
        tensors = {name: tensor.to(job.device) for name, tensor in tensors.items()}
        return Pool(**tensors, patch=job.config.model.patch_size)

    def _keep(self, stepper: Stepper, rounds: int) -> None:
        job = self._job
        tensors = {f"student/{name}": tensor for name, tensor in self.student.state_dict().items()}
        tensors |= {f"stepper/{name}": tensor for name, tensor in stepper.state().items()}
        seconds = {"distillation": job.stopwatch.seconds["distillation"]}
        job.checkpoints.save("student", STUDENT_SETTINGS, tensors, rounds=rounds, seconds=seconds)

    def _restore(self, stepper: Stepper) -> int:
        """Put the student where an earlier start left it; returns how many rounds of distillation are behind it.

        Images that depend on the student need the one of their own round: if a batch of an earlier round is lost, the
        student starts again as well.
        """
        job = self._job
        kept = job.checkpoints.load("student", STUDENT_SETTINGS)
        if kept is None:
            return 0
        tensors, facts = kept
        rounds: int = facts["rounds"]
        if self._by_student:
            earlier = [_name(r, number) for r in range(rounds) for number in range(len(_targets(r, job.config)))]
            if not all(job.checkpoints.has(name, self._image_settings) for name in earlier):
                return 0
        self.student.load_state_dict(_under("student/", tensors))
        stepper.restore(_under("stepper/", tensors))
        job.stopwatch.add(facts["seconds"])
        log.info("distillation: %d of %d rounds are of an earlier start", rounds, job.config.distill.rounds)
        return rounds


@dataclass(frozen=True)
class Batch:
    """The task of making one batch of images, with a random stream of its own."""

    make: Make
    seed: int
    stage: str
    round: int

    def __call__(self, item: tuple[int, Tensor], report: Report) -> tuple[Pool, Series]:
        (number, targets), series = item, Series()

        def on_step(loss: float, alive: float) -> None:
            series.add(loss=loss, alive=alive)
            report(len(targets), loss=loss, alive=alive)

        return self.make(targets, stream(self.seed, self.stage, self.round, number), on_step), series


def _targets(r: int, config: Config) -> tuple[Tensor, ...]:
    """Of each batch of a round."""
    targets = balanced_targets(config, stream(config.seed, "targets", r))
    chunks: tuple[Tensor, ...] = targets.split(config.inversion.batch_size)
    return chunks


def balanced_targets(config: Config, rng: torch.Generator) -> Tensor:
    """One round's classes, all equally often but for a remainder, in random order, or, with routing, in theirs [M].

    `pri4` makes several images of each target, so it gets as many fewer.
    """
    count = -(-config.distill.images_per_round // config.inversion.images_each)
    classes = config.model.num_classes
    every = torch.arange(count) % classes
    offset = torch.randint(classes, (1,), generator=rng)  # the remainder is not always of the first classes
    targets = ((every + offset) % classes)[torch.randperm(count, generator=rng)]
    # Where images go to the teachers of their class, batches of few classes leave most teachers out altogether.
    return targets.sort().values if config.inversion.route else targets


def _name(r: int, number: int) -> str:
    return f"images-{r}-{number}"


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
