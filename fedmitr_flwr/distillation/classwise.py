"""The clients' heads merged class by class: each class has its row from those who know it.

In the average a class's row comes from all clients, by how many images they have of whatever class; those who never
saw the class have only ever pushed it down. Here it comes from those whom the ensemble would ask.

Shapes: K clients, Y classes, D features.
"""

import torch
from timm.models.vision_transformer import VisionTransformer

from ..vit.ensemble import Ensemble


@torch.no_grad()
def merge_heads(student: VisionTransformer, ensemble: Ensemble) -> None:
    """Give `student` the head of rows Σ_k a_ky (w_ky - w̄_k), all brought to their mean length [M]; biases likewise.

    a (K, Y) are the ensemble's weights, w_ky is client k's row of class y, and w̄_k the mean of its rows, which moves
    all of its logits alike and means nothing. Rows of one length are τ-normalisation with τ = 1 (Kang et al. 2020) [C]:
    a class that was seen often has a long one, and is then named too often.
    """
    uploaded = len(ensemble.teachers) - ensemble.silent  # a teacher of frozen features has a head for others
    weights_KY = ensemble.weights[:uploaded] / ensemble.weights[:uploaded].sum(0).clamp_min(1e-30)
    rows_YD = torch.zeros_like(student.head.weight)
    bias_Y = torch.zeros_like(student.head.bias)
    for k, weights_Y in enumerate(weights_KY):
        head = ensemble.teachers[k].head
        rows_YD += weights_Y[:, None] * (head.weight - head.weight.mean(0))
        bias_Y += weights_Y * (head.bias - head.bias.mean())
    lengths_Y1 = rows_YD.norm(dim=1, keepdim=True)
    student.head.weight.copy_(rows_YD * (lengths_Y1.mean() / lengths_Y1.clamp_min(1e-30)))
    student.head.bias.copy_(bias_Y)
