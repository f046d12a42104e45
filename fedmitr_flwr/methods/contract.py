"""What a method gets, and what it gives back."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config import Config
from ..distillation.pool import Pool
from ..training.upload import Upload, Weights


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
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """The server phase of one run: uploads sorted by client, settings, and where to report."""

    uploads: Sequence[Upload]
    config: Config
    device: torch.device
    log: Callable[..., None]  # one line of metrics.jsonl
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


@dataclass(frozen=True)
class Fused:
    """A global model.

    Attributes:
        predict: images (B, C, S, S) -> scores (B, Y).
        weights: of the one ViT that it is; None where it keeps several models.
        pool: the synthetic images it was distilled from, if any.
    """

    predict: nn.Module
    weights: Weights | None
    pool: Pool | None = None
