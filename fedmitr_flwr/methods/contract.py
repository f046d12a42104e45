"""What a method gets, and what it gives back."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from ..common.workers import Threads, Workers
from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool
from ..runs.checkpoints import Checkpoints
from ..uploads.upload import Upload
from ..vit.build import Weights, initial_weights
from ..vit.taps import network_of

# Settings that a method without synthetic images does not read. The others of `inversion.*` are also the ensemble's.
OF_IMAGES = ("inversion.mode", "inversion.steps", "inversion.stops", "inversion.route", "relabel.", "distill.")
DIVERGED = "lower distill.lr"  # what to do about a student that diverged


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({name: time.perf_counter() - start})

    @contextmanager
    def aside(self, name: str, within: str) -> Iterator[None]:
        """A stage inside another one, whose seconds are not that one's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.add({name: spent, within: -spent})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was measured elsewhere, such as by an earlier start of the run."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


@dataclass(frozen=True)
class Job:
    """The server phase of one run: uploads sorted by client, settings, and where to report."""

    uploads: Sequence[Upload]
    config: Config
    device: torch.device
    log: Callable[..., None]  # one line of metrics.jsonl
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    work: Path | None = None  # the folder for checkpoints; None: nothing is kept
    judge: Callable[[nn.Module], float] | None = None  # a student's accuracy in percent, to be shown while it learns
    common: Path | None = None  # the folder of what all methods make alike of these uploads; None: nothing is kept
    origin: Callable[[], Weights] | None = None  # gives what the clients started from; None: the settings say it
    workers: Workers = field(default_factory=Threads)  # of what can be done side by side

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Where a method keeps what it has finished, so that a later start need not do it again."""
        return Checkpoints(self.work, self.config, self.uploads, self.device)

    @cached_property
    def in_common(self) -> Checkpoints:
        """Where that is kept."""
        return Checkpoints.of_any_method(self.common, self.config, self.uploads, self.device)

    @cached_property
    def start(self) -> Weights:
        """The weights that the clients started from."""
        return self.origin() if self.origin else initial_weights(self.config.model, self.config.seed)


@dataclass(frozen=True)
class Fused:
    """A global model."""

    predict: nn.Module  # images (B, C, S, S) -> scores (B, Y)
    weights: Mapping[str, Tensor] | None  # of the one model that it is (`vit.taps`); None where it keeps several
    pool: Pool | None = None  # the synthetic images it was distilled from, if any
    ensemble: Ensemble | None = None  # of all uploads, in order, weighted as in the end, if the method asked them

    @classmethod
    def of_weights(cls, weights: Weights, job: Job) -> Self:
        """The network of these weights."""
        return cls(network_of(job.config.model, weights).to(job.device), weights)

    @classmethod
    def of_student(cls, student: nn.Module, ensemble: Ensemble, pool: Pool | None = None) -> Self:
        """The student as it was trained by the ensemble."""
        weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
        return cls(student, weights, pool, ensemble)
