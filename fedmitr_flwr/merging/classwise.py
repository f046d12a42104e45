"""The clients' heads merged class by class: each class has its row from those who know it.

In the average a class's row comes from all clients, by how many images they have of whatever class; those who never
saw the class have only ever pushed it down. Here it comes from those whom the ensemble would ask.

Shapes: K clients, M images, Y classes, D features.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..ensemble.ensemble import Ensemble

BATCH = 256  # images that the student is asked about at once


@torch.no_grad()
def merge_heads(student: VisionTransformer, ensemble: Ensemble, images_MCHW: Tensor) -> None:
    """Give `student` the head of rows Σ_k a_ky (w_ky - w̄_k), biases likewise, by which all classes speak alike [M].

    a (K, Y) are the ensemble's weights, w_ky is client k's row of class y, and w̄_k the mean of its rows, which moves
    all of its logits alike and means nothing. Then each class's logit is scaled so that it varies over the synthetic
    images, which are of all classes alike, as much as the classes' logits do on average. Rows of one length
    (τ-normalisation, Kang et al. 2020) would do that if features varied alike in all directions.
    """
    weights_KY = ensemble.weights / ensemble.weights.sum(0).clamp_min(1e-30)
    student.head.weight.zero_()
    student.head.bias.zero_()
    for k, weights_Y in enumerate(weights_KY):
        head = ensemble.teachers[k].head
        student.head.weight += weights_Y[:, None] * (head.weight - head.weight.mean(0))
        student.head.bias += weights_Y * (head.bias - head.bias.mean())
    logits_MY = torch.cat([student(images) for images in images_MCHW.split(BATCH)])
    spread_Y = logits_MY.std(0, correction=0)
    scale_Y = torch.where(spread_Y > 0, spread_Y.mean() / spread_Y, 1)
    student.head.weight *= scale_Y[:, None]
    student.head.bias *= scale_Y
