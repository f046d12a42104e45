"""Where the student starts."""

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
from ..merging.task_vectors import wudi
from ..uploads.upload import Upload
from ..vit.build import Weights, build_vit, initial_weights
from ..vit.tokens import TokenLogits, forward_tokens
from .distil import seen
from .losses import centred

BATCH = 256  # images that are asked about at once


def start_student(
    uploads: Sequence[Upload], config: Config, origin: Callable[[], Weights] | None = None
) -> VisionTransformer:
    """The student before distillation: the clients' average or merged bodies, or their start as it was.

    Heads that are to be merged by class wait for images: `settle`. `origin` gives what the clients started from; None:
    the settings say it.
    """
    student, distill = build_vit(config.model, config.seed), config.distill
    assert distill.resolved, "distill.* has settings that are to be resolved first"
    if distill.init == "wudi":
        weights = wudi(uploads, origin() if origin else initial_weights(config.model, config.seed))
    else:
        weights = average(uploads) if distill.merges else initial_weights(config.model, config.seed)
    student.load_state_dict(weights)
    return student


def settle(student: VisionTransformer, ensemble: Ensemble, pool: Pool) -> dict[str, float]:
    """Give the start, which has the average's, a head merged by class on these images. Returns facts for metrics."""
    said_MY = answers(ensemble, pool)
    facts = {"likeness_before": likeness(student, said_MY, pool)}
    merge_heads(student, ensemble, pool.images)
    facts["likeness"] = likeness(student, said_MY, pool)
    return facts


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
