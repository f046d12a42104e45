"""Where the student starts."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..config import Config
from ..ensemble.ensemble import Ensemble
from ..inversion.pool import Pool
from ..merging.average import average
from ..merging.classwise import merge_heads
from ..uploads.upload import Upload
from ..vit.build import Weights, build_vit, initial_weights
from ..vit.tokens import TokenLogits, forward_tokens
from .distil import seen
from .losses import centred

log = logging.getLogger("fedmitr")

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # that `choose_start` tries
BATCH = 256  # images that are asked about at once


def start_student(uploads: Sequence[Upload], config: Config) -> VisionTransformer:
    """The student before distillation: the clients' average, or their start as it was.

    The average is moved by `distill.extrapolate`; where that is to be chosen (0), or heads are to be merged by class,
    that waits for images: `settle`.
    """
    student, distill = build_vit(config.model, config.seed), config.distill
    assert distill.resolved, "distill.* has settings that are to be resolved first"
    mean = average(uploads) if distill.merges else initial_weights(config.model, config.seed)
    student.load_state_dict(mean)
    if distill.merges and distill.extrapolate not in (0, 1):
        _place(student, initial_weights(config.model, config.seed), mean, distill.extrapolate)
    return student


def settle(student: VisionTransformer, ensemble: Ensemble, pool: Pool, config: Config) -> dict[str, float]:
    """Do with the start what needs images: choose the average's way, give it another head. Gives facts for metrics."""
    facts: dict[str, float] = {}
    said_MY = answers(ensemble, pool)
    if config.distill.chooses_start:
        facts["extrapolate"] = choose_start(student, said_MY, pool, config)
    if config.distill.init == "classwise":  # behind the choice: the body goes the way, and the head is not on it
        facts["likeness_of_average"] = likeness(student, said_MY, pool)
        merge_heads(student, ensemble, pool.images)
        facts["likeness"] = likeness(student, said_MY, pool)
    return facts


def choose_start(student: VisionTransformer, said_MY: Tensor, pool: Pool, config: Config) -> float:
    """Move `student`, which is the clients' average, by the factor that is most like the ensemble on the pool [M].

    Returns:
        The factor of `FACTORS` whose model has the highest `likeness`.
    """
    start = initial_weights(config.model, config.seed)
    mean = {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()}
    found: dict[float, float] = {}
    for factor in FACTORS:
        _place(student, start, mean, factor)
        found[factor] = likeness(student, said_MY, pool)
    best = max(found, key=found.__getitem__)
    _place(student, start, mean, best)
    tried = ", ".join(f"{factor:g}: {value:.3f}" for factor, value in found.items())
    log.info("the student starts at %g times the average's way; likeness to the ensemble by factor: %s", best, tried)
    return best


def likeness(student: VisionTransformer, said_MY: Tensor, pool: Pool) -> float:
    """The mean cosine of centred answers of student and ensemble, which `said_MY`, over the pool.

    A longer way makes answers longer, and a divergence would weigh that against what they say (docs/LOG.md).
    """
    own_MY = _asked(partial(forward_tokens, student), pool)
    return cosine_similarity(centred(said_MY), centred(own_MY)).mean().item()


def answers(ensemble: Ensemble, pool: Pool) -> Tensor:
    """What the ensemble teaches of the pool's images: (M, Y)."""
    return _asked(ensemble.scores, pool)


@torch.no_grad()
def _asked(ask: Callable[[Tensor, Tensor], TokenLogits], pool: Pool) -> Tensor:
    """What the class token says of all images of the pool: (M, Y)."""
    chunks = torch.arange(len(pool), device=pool.patches.device).split(BATCH)
    return torch.cat([ask(seen(pool, chunk), pool.positions[chunk]).cls for chunk in chunks])


def _place(student: VisionTransformer, start: Weights, mean: Weights, factor: float) -> None:
    """w⁰ + factor · (w̄ - w⁰), in float64; 1 is w̄ to the bit. The form of a server's step as in FedExP [C]."""
    student.load_state_dict({name: torch.lerp(start[name].double(), mean[name].double(), factor) for name in mean})
