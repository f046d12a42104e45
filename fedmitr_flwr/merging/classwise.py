"""The clients' heads merged class by class: each class has its row from those who know it.

In the average a class's row comes from all clients, by how many images they have of whatever class; those who never
saw the class have only ever pushed it down. Here it comes from those whom the ensemble would ask.

Shapes: K clients, M images, Y classes, D features and the bias.
"""

from functools import reduce

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..ensemble.contrast import Contrast
from ..ensemble.ensemble import Ensemble

BATCH = 256  # images that the student is asked about at once


@torch.no_grad()
def merge_heads(student: VisionTransformer, ensemble: Ensemble, images_MCHW: Tensor) -> None:
    """Give `student` the clients' heads, merged as `Contrast` merges logits, by which all classes speak alike [M].

    The map is linear, so on features that all clients share the head says what `Contrast` makes of theirs. Then each
    class's logit is scaled so that it varies over the synthetic images, which are of all classes alike, as much as the
    classes' logits do on average. Rows of one length (τ-normalisation, Kang et al. 2020) would do that if features
    varied alike in all directions.
    """
    contrast = Contrast(ensemble.weights)
    heads = (ensemble.teachers[k].head for k in range(len(ensemble.teachers)))
    parts = (contrast.part(k, torch.cat([head.weight.T, head.bias[None]])) for k, head in enumerate(heads))
    *rows_DY, bias_Y = contrast.scores(reduce(contrast.join, parts))
    student.head.weight.copy_(torch.stack(rows_DY, dim=1))
    student.head.bias.copy_(bias_Y)
    logits_MY = torch.cat([student(images) for images in images_MCHW.split(BATCH)])
    spread_Y = logits_MY.std(0, correction=0)
    scale_Y = torch.where(spread_Y > 0, spread_Y.mean() / spread_Y, 1)
    student.head.weight *= scale_Y[:, None]
    student.head.bias *= scale_Y
