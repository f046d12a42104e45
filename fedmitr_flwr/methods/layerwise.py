"""Layerwise merging: the clients' average, its layers solved one after the other on scouting images [M].

What is to be had of the uploads in seconds: few images of few steps, and no distillation.
The closed form and its sources are in merging/layerwise.py.
"""

from ..config import Config
from ..distillation.start import start_student
from ..inversion.scout import Weigher, first_images
from ..merging.layerwise import fit_layers
from .contract import OF_IMAGES, Fused, Job

UNREAD = OF_IMAGES


def settings(config: Config) -> Config:
    """What is fitted is the average, and nothing else."""
    return Config.from_flat({"distill.init": "average"}, base=config)


def fuse(job: Job) -> Fused:
    """Make first images, weigh the clients by them, and fit the average to the clients."""
    config = job.config
    weigher = Weigher(job.uploads, config, job.device)
    with job.stopwatch.stage("inversion"):
        images, targets = first_images(weigher.ensemble, config)
        weigher.refine(images, targets)
    student = start_student(job.uploads, config).to(job.device)
    with job.stopwatch.stage("fitting"):
        fit_layers(student, weigher.ensemble, images, targets)
    return Fused.of_student(student, weigher.ensemble)
