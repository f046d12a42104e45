"""Heads merged class by class: against numbers computed by hand, and what must not change anything."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, an_upload, fused, settings, some_images
from torch import Tensor
from torch.nn.functional import normalize

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.classwise import merge_heads
from fedmitr_flwr.vit.build import vit_of

CONFIG = settings()
CLASSES = CONFIG.model.num_classes
IMAGES = some_images(CONFIG, 40)


def with_head(seed: int, rows_YD: Tensor, bias_Y: Tensor) -> VisionTransformer:
    vit = a_vit(CONFIG, seed)
    with torch.no_grad():
        vit.head.weight.zero_()[:2, :2].copy_(rows_YD)
        vit.head.bias.zero_()[:2].copy_(bias_Y)
    return vit


def merged(teachers: list[VisionTransformer], weights_KY: Tensor) -> VisionTransformer:
    student = a_vit(CONFIG, 9)
    merge_heads(student, Ensemble(teachers, weights_KY, "probs"), IMAGES)
    return student


def test_each_class_has_the_row_of_who_knows_it() -> None:
    """Two clients, each weighed in one class alone; rows sum to nothing, so that centring leaves them."""
    rows, bias = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([0.5, 0.25])
    first = with_head(0, torch.stack([rows[0], -rows[0]]), torch.tensor([0.5, -0.5]))
    second = with_head(1, torch.stack([-rows[1], rows[1]]), torch.tensor([-0.25, 0.25]))
    weights_KY = torch.full((2, CLASSES), 0.5)
    weights_KY[:, :2] = torch.eye(2)
    student, body = merged([first, second], weights_KY), a_vit(CONFIG, 9)
    logits = body.forward_head(body.forward_features(IMAGES), pre_logits=True)[:, :2] @ rows.T + bias
    spread = logits.std(0, correction=0)
    scale = spread.sum() / CLASSES / spread  # the other eight classes say the same of all images
    torch.testing.assert_close(student.head.weight[:2, :2], scale[:, None] * rows)
    assert not student.head.weight[2:].any()
    torch.testing.assert_close(student.head.bias[:2], scale * bias)
    torch.testing.assert_close(student(IMAGES)[:, :2], logits * scale)
    for name, tensor in body.state_dict().items():
        assert name.startswith("head") or torch.equal(student.state_dict()[name], tensor), name


def test_what_changes_nothing() -> None:
    """A factor of all weights, and what moves all logits of a client alike."""
    teachers = [a_vit(CONFIG, seed) for seed in range(3)]
    weights_KY = torch.rand(3, CLASSES, generator=stream(0))
    before = merged(teachers[:2], weights_KY[:2])
    scaled = merged(teachers[:2], 3 * weights_KY[:2])
    with torch.no_grad():
        teachers[0].head.weight += torch.randn(CONFIG.model.width, generator=stream(1))
        teachers[0].head.bias += 7
    for after in (scaled, merged(teachers[:2], weights_KY[:2])):
        torch.testing.assert_close(before.head.weight, after.head.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(before.head.bias, after.head.bias, rtol=0, atol=1e-5)


def test_all_classes_vary_alike_in_the_directions_of_the_average_where_all_weigh_alike() -> None:
    teachers = [a_vit(CONFIG, seed) for seed in range(3)]
    student = merged(teachers, torch.full((3, CLASSES), 1 / 3))
    mean = torch.stack([teacher.head.weight for teacher in teachers]).mean(0)
    torch.testing.assert_close(normalize(student.head.weight), normalize(mean - mean.mean(0)))
    spread = student(IMAGES).std(0, correction=0)
    torch.testing.assert_close(spread, spread.mean().expand(CLASSES))


@pytest.mark.parametrize("extrapolate", [1.0, 0.0, 1.5])
def test_fedmitr_starts_from_it_once_there_are_images(extrapolate: float) -> None:
    """At no rate to speak of the student that comes back is its start: the average's body, moved or not, this head."""
    start = {"distill.init": "classwise", "distill.extrapolate": extrapolate}
    uploads, metrics = [an_upload(CONFIG, client, 10 + client) for client in range(2)], list[dict[str, Any]]()
    told = fused(settings(**start, **{"distill.lr": 1e-12, "distill.rounds": 2}), uploads, metrics)
    (line,) = [line for line in metrics if line["stage"] == "start"]
    assert ("extrapolate" in line) == (extrapolate == 0)
    assert {"likeness", "likeness_of_average"} <= set(line)
    spread = vit_of(CONFIG.model, told.weights)(told.pool.images[:10]).std(0, correction=0)  # of the first round's
    torch.testing.assert_close(spread, spread.mean().expand(CLASSES), rtol=1e-4, atol=1e-5)
    name = "blocks.0.mlp.fc1.weight"
    same = torch.allclose(told.weights[name], average(uploads)[name], atol=1e-6)
    assert same == (extrapolate == 1 or line.get("extrapolate") == 1)
