"""The student's start by setting, and how like the ensemble it is; heads merged by class, against numbers by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, an_upload, fused, same, settings, some_images, two_uploads
from torch import Tensor
from torch.nn.functional import normalize

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.distillation.start import answers, likeness, start_student
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.classwise import merge_heads
from fedmitr_flwr.vit.build import initial_weights, vit_of

CONFIG = settings()
CLASSES = CONFIG.model.num_classes
IMAGES = some_images(CONFIG, 40)


def test_the_students_start() -> None:
    """The average to the bit, also where it is to get another head."""
    mean = average(two_uploads())
    for init, wanted in {"average": mean, "classwise": mean, "initial": initial_weights(CONFIG.model, 4)}.items():
        config = settings(seed=4, **{"distill.init": init})
        assert same(start_student(two_uploads(), config).state_dict(), wanted), init


def test_initial_is_what_the_clients_started_from(tmp_path: Path) -> None:
    there = {name: tensor.clone() for name, tensor in a_vit(CONFIG, 9).state_dict().items()}
    save_file(there, tmp_path / "weights.safetensors")
    config = settings(**{"distill.init": "initial", "model.weights": str(tmp_path / "weights.safetensors")})
    assert same(start_student([an_upload(config, 0)], config).state_dict(), there)


def test_likeness_is_the_correlation_of_answers_on_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy's Pearson correlation over the classes."""
    config, student = settings(**{"inversion.mode": "dense"}), a_vit(CONFIG, 9)
    ensemble = Ensemble.of(two_uploads(), config.model, config.ensemble)
    images = invert(ensemble, torch.arange(20) % 10, config.inversion, config.model, flip=False, rng=stream(0))
    pool = relabel(images, config.relabel.mode)
    both = zip(*(model(pool.images).detach().numpy() for model in (ensemble, student)), strict=True)
    wanted = np.mean([np.corrcoef(one, other)[0, 1] for one, other in both])
    for batch_size in (7, 20, 256):
        monkeypatch.setattr("fedmitr_flwr.distillation.start.BATCH", batch_size)
        assert likeness(student, answers(ensemble, pool), pool) == pytest.approx(wanted, rel=1e-5)


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


def test_fedmitr_starts_from_it_once_there_are_images() -> None:
    """At no rate to speak of the student that comes back is its start: the average's body, this head."""
    uploads, metrics = two_uploads(), list[dict[str, Any]]()
    told = fused(settings(**{"distill.init": "classwise", "distill.lr": 1e-12, "distill.rounds": 2}), uploads, metrics)
    (line,) = [line for line in metrics if line["stage"] == "start"]
    assert {"likeness", "likeness_of_average"} <= set(line)
    spread = vit_of(CONFIG.model, told.weights)(told.pool.images[:10]).std(0, correction=0)  # of the first round's
    torch.testing.assert_close(spread, spread.mean().expand(CLASSES), rtol=1e-4, atol=1e-5)
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(told.weights[name], average(uploads)[name], rtol=0, atol=1e-6)
