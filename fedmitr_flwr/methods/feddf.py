"""FedDF: the ensemble distilled on real images without labels, which data-free methods do not have.

Source: Lin et al., NeurIPS 2020, Algorithm 1 [C], in one round: the student starts from the clients' average and
follows the ensemble's answers, KL(ensemble ‖ student) at temperature 1.

The images are those of `feddf.path`, or, for data sets that have no relative, `data.proxy`: a share of the training
images that no client gets. The latter are of the clients' own classes, evenly: the best that FedDF could wish for.
Either way this is no rival on equal terms but a line of reference. With `data.proxy` the clients have fewer images, so
compare only methods that share the uploads.

Deviations [M]: the ensemble is `config.ensemble`'s and answers as it decides (`combine`), FedDF's own being the mean of
logits; optimiser, rate and batch are those of FedMITR's distillation; a fixed number of passes and the last weights,
where FedDF stops early on labelled validation images; images are shifted and flipped as at the clients.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..client.train import shift_and_flip
from ..common.progress import Progress
from ..common.rng import stream
from ..config import Config
from ..data.images import prepare
from ..data.proxy import proxy_pixels, require_proxy
from ..distillation.distil import BATCH, student_stepper
from ..distillation.losses import soft_divergence
from ..distillation.start import start_student
from ..ensemble.ensemble import Ensemble
from ..inversion.scout import scouted_ensemble
from ..uploads.gate import require_finite
from .contract import DIVERGED, OF_IMAGES, Fused, Job

UNREAD = tuple(key for key in OF_IMAGES if key != "distill.")
UNREAD += ("distill.rounds", "distill.images-per-round", "distill.epochs-per-round")

PASSES = 20  # over the images; more is a matter of minutes, and was not tried


def check(config: Config) -> None:
    """There are images that are real."""
    require_proxy(config)


def settings(config: Config) -> Config:
    """Merged heads need synthetic images: the student starts from the average."""
    forced: dict[str, object] = {"distill.init": "average"} if config.distill.merges_heads else {}
    return Config.from_flat(forced, base=config)


def fuse(job: Job) -> Fused:
    """Distil on the images that the settings name."""
    config = job.config
    pixels = proxy_pixels(config)
    with job.stopwatch.stage("ensemble"):
        ensemble = scouted_ensemble(job.uploads, config, job.device)
    student = start_student(job.uploads, config).to(job.device)
    with job.stopwatch.stage("distillation"):
        loss = follow(student, ensemble, pixels, config, stream(config.seed, "feddf"), job.device)
    require_finite(student.state_dict(), DIVERGED, "the student")
    job.log(stage="distillation", images=len(pixels), kd=loss)
    return Fused.of_student(student, ensemble)


def follow(
    student: VisionTransformer,
    ensemble: Ensemble,
    pixels_NCHW: Tensor,
    config: Config,
    rng: torch.Generator,
    device: torch.device,
) -> float:
    """Train `student` in place to answer as the ensemble does; gives the last pass's mean divergence."""
    stepper = student_stepper(student, config, PASSES * -(-len(pixels_NCHW) // BATCH))
    student.train()
    mean = 0.0
    with Progress("distillation", PASSES * len(pixels_NCHW), unit="images") as progress:
        for _ in range(PASSES):
            losses = []
            for batch in torch.randperm(len(pixels_NCHW), generator=rng).split(BATCH):
                images = prepare(pixels_NCHW[batch].to(device), config.model)
                if config.local.augment:
                    images = shift_and_flip(images, flip=config.data.flips, rng=rng)
                with torch.no_grad():
                    scores = ensemble(images)
                loss = soft_divergence(scores, student(images), 1.0).mean()
                stepper.step(loss)
                losses.append(loss.item() * len(batch))
                progress.update(len(batch), loss=loss.item())
            mean = sum(losses) / len(pixels_NCHW)
    student.eval()
    return mean
