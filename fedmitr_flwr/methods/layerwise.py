"""Layerwise merging: the clients' average, its layers solved one after the other on scouting images [M].

What is to be had of the uploads in seconds: few images of few steps, and no distillation.
The closed form and its sources are in merging/layerwise.py.
"""

from ..common.errors import ConfigError
from ..config import Config
from ..distillation.start import start_student
from ..inversion.scout import Weigher, first_images
from ..merging.layerwise import fit_layers
from .contract import Fused, Job


def check(config: Config) -> None:
    """It starts from the average, by a given `distill.extrapolate`."""
    if config.distill.init != "average":
        raise ConfigError(
            f"distill.init = {config.distill.init!r}, but method = 'layerwise' fits the average; set it to 'average'"
        )
    if config.distill.chooses_start:
        raise ConfigError("distill.extrapolate = 0 is not for method = 'layerwise'; set it to 1")


def fuse(job: Job) -> Fused:
    """Make first images, weigh the clients by them, and fit the average to the clients."""
    config = job.config
    weigher = Weigher(job.uploads, config, job.device)
    with job.stopwatch.stage("inversion"):
        images, targets = first_images(weigher.ensemble, config)
        weigher.refine(images, targets, r=0)
    student = start_student(job.uploads, config).to(job.device)
    with job.stopwatch.stage("fitting"):
        fit_layers(student, weigher.ensemble, images, targets)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    return Fused(student, weights, ensemble=weigher.ensemble)
