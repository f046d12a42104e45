"""FedMITR: sparse model inversion, token relabelling, distillation (arXiv 2605.10748).

A reconstruction: the paper's equations were not available. docs/fedmitr.md says which lines are the paper's [P], which
come from a cited method [C], and which are ours [M].
"""

import torch
from torch import Tensor

from ..config import Config
from ..distillation.distil import count_batches, distil, start_student
from ..distillation.losses import Parts
from ..distillation.pool import Pool, join
from ..distillation.relabel import relabel
from ..inversion.invert import invert
from ..progress import Progress
from ..rng import stream
from ..training.optim import Stepper
from ..vit.ensemble import Ensemble
from .contract import Fused, Job


def fuse(job: Job) -> Fused:
    """Generate, relabel, distil; E times, on a pool that grows."""
    config = job.config
    ensemble = Ensemble.of(job.uploads, config.model, config.ensemble).to(job.device)
    student = start_student(job.uploads, config).to(job.device)
    pools: list[Pool] = []
    stepper: Stepper | None = None
    for epoch in range(config.distill.epochs):
        pools += make_images(ensemble, epoch, job)
        pool = join(pools)
        if stepper is None:
            stepper = Stepper(student.parameters(), config.distill, count_batches(pool.views, config))
        with job.stopwatch.stage("distillation"):
            _distil(student, ensemble, pool, stepper, epoch, job)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    return Fused(student, weights, pool)


def make_images(ensemble: Ensemble, epoch: int, job: Job) -> list[Pool]:
    """Invert and relabel one epoch's images, batch by batch."""
    config = job.config
    targets = balanced_targets(config, stream(config.seed, "targets", epoch))
    pools = []
    label = f"inversion {epoch + 1}/{config.distill.epochs}"
    with Progress(label, total=len(targets) * config.inversion.steps, unit="img·step") as progress:
        for number, chunk in enumerate(targets.split(config.inversion.batch_size)):

            def on_step(loss: float, alive: float, images: int = len(chunk)) -> None:
                progress.update(images, loss=loss, alive=alive)

            with job.stopwatch.stage("inversion"):
                inverted = invert(
                    ensemble,
                    chunk,
                    config.inversion,
                    config.model,
                    flip=config.data.flip,
                    rng=stream(config.seed, "inversion", epoch, number),
                    on_step=on_step,
                )
            with job.stopwatch.stage("relabelling"):
                pools.append(Pool.of(inverted, relabel(ensemble, inverted, config.relabel)))
            alive = inverted.alive.float().mean().item()
            job.log(stage="inversion", epoch=epoch, batch=number, loss=inverted.loss.mean().item(), alive=alive)
    return pools


def balanced_targets(config: Config, rng: torch.Generator) -> Tensor:
    """One epoch's classes, all equally often but for a remainder, in random order [M].

    `pri` makes several images of each target, so it gets as many fewer.
    """
    per_target = config.inversion.rebirths if config.inversion.mode == "pri" else 1
    count = -(-config.distill.images_per_epoch // per_target)
    classes = config.model.num_classes
    every = torch.arange(count) % classes
    offset = torch.randint(classes, (1,), generator=rng)  # the remainder is not always of the first classes
    return ((every + offset) % classes)[torch.randperm(count, generator=rng)]


def _distil(student: torch.nn.Module, ensemble: Ensemble, pool: Pool, stepper: Stepper, epoch: int, job: Job) -> None:
    config = job.config
    label = f"distillation {epoch + 1}/{config.distill.epochs}"
    images = config.distill.passes * sum(len(view) for view in pool.views)
    means: dict[str, list[float]] = {name: [] for name in Parts._fields}
    with Progress(label, total=images, unit="img") as progress:

        def on_batch(count: int, parts: Parts) -> None:
            values = {name: part.item() for name, part in parts._asdict().items()}
            for name, value in values.items():
                means[name].append(value)
            progress.update(count, loss=parts.total(config.distill).item(), alive=pool.alive.float().mean().item())

        distil(student, ensemble, pool, config, stepper, stream(config.seed, "distillation", epoch), on_batch)
    job.log(stage="distillation", epoch=epoch, **{name: sum(values) / len(values) for name, values in means.items()})
