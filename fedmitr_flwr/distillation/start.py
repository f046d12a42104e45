"""Where the student starts."""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cosine_similarity

from ..common.errors import ConfigError
from ..common.files import absolute
from ..config import Config, ModelConfig
from ..config.sections import IMPROVED
from ..ensemble.ensemble import Ensemble
from ..merging.average import average
from ..merging.classwise import merge_heads
from ..merging.closed_form import frozen_weights, pooled
from ..merging.layerwise import fit_layers
from ..merging.regmean import regmean
from ..statistics.heads import closed_form
from ..uploads.upload import Upload
from ..vit.build import Weights, build_vit, initial_weights, load_pretrained
from ..vit.names import SMALL
from ..vit.tokens import forward_tokens, patchify, take
from .losses import centred
from .pool import Pool

log = logging.getLogger("fedmitr")

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 2.5)  # that `choose_start` tries


def require_start(config: Config) -> None:
    """Raise a UserError where `distill.init` names weights that are not there or do not fit; the hub is not asked."""
    model, distill = config.model, config.distill
    if distill.init != "pretrained":
        return
    if distill.pretrained != "timm":
        if not absolute(distill.pretrained, "distill.pretrained").is_file():
            raise ConfigError(f"distill.pretrained = {distill.pretrained!r}: there is no such file; give another")
        if model.resolved:
            _require_fitting(model, distill.pretrained)
    elif model.name == SMALL:
        raise ConfigError(
            f"distill.init = 'pretrained': there are no timm weights for model.name = {SMALL!r}; "
            "set distill.pretrained to a safetensors file, or distill.init to another start"
        )


@lru_cache(maxsize=4)
def _require_fitting(model: ModelConfig, source: str) -> None:
    load_pretrained(build_vit(model), model, source, "distill.pretrained")


def start_student(uploads: Sequence[Upload], config: Config) -> VisionTransformer:
    """The student before distillation: the clients merged, their start as it was or with a head, or other weights.

    What is merged is moved by `distill.extrapolate`; where that is to be chosen (0), heads are to be merged by class,
    or layers are to be fitted, that waits for images: `settle`.
    """
    student, distill = build_vit(config.model, config.seed), config.distill
    assert distill.resolved, "distill.* has settings that are to be resolved first"
    if distill.merges:
        mean = regmean(uploads) if distill.init == "regmean" else average(uploads)
        student.load_state_dict(mean)
        if distill.extrapolate not in (0, 1):
            _place(student, initial_weights(config.model, config.seed), mean, distill.extrapolate)
    elif distill.init == "statistics":
        student.load_state_dict(frozen_weights(config, closed_form("lda", pooled(uploads), config.statistics)))
    elif distill.init == "initial":
        student.load_state_dict(initial_weights(config.model, config.seed))
    else:
        load_pretrained(student, config.model, distill.pretrained, "distill.pretrained")
    return student


def settle(student: VisionTransformer, ensemble: Ensemble, pool: Pool, config: Config) -> dict[str, float]:
    """Do with the start what needs images: choose the average's way, give it another head, fit its layers.

    Returns:
        What there is to tell.
    """
    told: dict[str, float] = {}
    if config.distill.chooses_start:
        told["extrapolate"] = choose_start(student, pool, config)
    if config.distill.init in IMPROVED:
        told["likeness_of_average"] = likeness(student, pool)
        if config.distill.init == "classwise":  # behind the choice: the body goes the way, and the head is not on it
            merge_heads(student, ensemble, pool.images)
        else:
            fit_layers(student, ensemble, pool.images, pool.targets, config.distill.ridge)
        told["likeness"] = likeness(student, pool)
    return told


def choose_start(student: VisionTransformer, pool: Pool, config: Config) -> float:
    """Move `student`, which is the clients' average, by the factor that is most like the ensemble on the pool [M].

    Returns:
        The factor of `FACTORS` whose model has the highest `likeness`.
    """
    start = initial_weights(config.model, config.seed)
    mean = {name: tensor.cpu().clone() for name, tensor in student.state_dict().items()}
    found: dict[float, float] = {}
    for factor in FACTORS:
        _place(student, start, mean, factor)
        found[factor] = likeness(student, pool)
    best = max(found, key=found.__getitem__)
    _place(student, start, mean, best)
    told = ", ".join(f"{factor:g}: {value:.3f}" for factor, value in found.items())
    log.info("the student starts at %g times the average's way; likeness to the ensemble by factor: %s", best, told)
    return best


@torch.no_grad()
def likeness(student: VisionTransformer, pool: Pool, batch_size: int = 256) -> float:
    """The mean cosine of centred answers of student and ensemble, over the images of the pool's first view.

    A longer way makes answers longer, and a divergence would weigh that against what they say (docs/adr/0026).
    """
    view = pool.views[0]
    total = 0.0
    for chosen in torch.arange(len(view), device=pool.images.device).split(batch_size):
        given = view.given[chosen]
        patches = take(patchify(pool.images[view.rows[chosen]], student.patch_embed.patch_size[0]), given)
        answer = forward_tokens(student, patches, given).cls
        total += cosine_similarity(centred(view.scores[chosen]), centred(answer)).sum().item()
    return total / len(view)


def _place(student: VisionTransformer, start: Weights, mean: Weights, factor: float) -> None:
    """w⁰ + factor · (w̄ - w⁰), in float64; 1 is w̄ to the bit. The form of a server's step as in FedExP [C]."""
    student.load_state_dict({name: torch.lerp(start[name].double(), mean[name].double(), factor) for name in mean})
