"""FedMITR: sparse model inversion, token relabelling, distillation (arXiv 2605.10748).

A reconstruction: the paper's equations were not available. docs/fedmitr.md says which lines are the paper's [P], which
come from a cited method [C], and which are ours [M].
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..config import Config
from ..distillation.relabel import relabel
from ..ensemble.ensemble import Ensemble
from ..inversion.invert import PIXELS, Pixels, invert
from ..inversion.pool import Pool
from ..inversion.scout import Weigher
from ..inversion.trajectory import OnStep
from ..merging.closed_form import beside_student, pooled
from .contract import Fused, Job
from .rounds import Rounds


def fuse(job: Job) -> Fused:
    """In each round: invert new images and relabel their tokens, weigh the teachers by all images so far, distil."""
    teachers = Weigher(job.uploads, job.config, job.device)  # the ensemble, and who of it knows which class
    rounds = Rounds(job, teachers, job.config.inversion.steps)  # the student starts from the clients' models
    rounds.scout()
    for r in rounds:
        rounds.images(r, partial(synthesise, teachers.ensemble, job.config))
        rounds.weigh()
        rounds.distil(r)
    return rounds.fused() if not job.config.upload.statistics else with_closed_form(rounds.fused(), job)


def with_closed_form(student: Fused, job: Job) -> Fused:
    """The student beside what the clients' statistics say, which is known exactly and needs no teacher: one model."""
    assert student.weights, "it is one model"
    assert student.pool, "it was distilled"
    weights = beside_student(student.weights, pooled(job.uploads), student.pool.images, job.config, job.device)
    return replace(Fused.of_weights(weights, job), pool=student.pool, ensemble=student.ensemble)


def synthesise(
    ensemble: Ensemble,
    config: Config,
    targets: Tensor,
    rng: torch.Generator,
    on_step: OnStep,
    pixels: Pixels = PIXELS,
) -> Pool:
    """One batch of images by `inversion.mode`; dense patches keep the class, others get the ensemble's soft labels."""
    flip = config.data.flips
    images = invert(ensemble, targets, config.inversion, config.model, pixels, flip=flip, rng=rng, on_step=on_step)
    return relabel(images.require_finite(), config.relabel.mode)
