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
from fedmitr_flwr.ensemble.contrast import Contrast
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.classwise import merge_heads
from fedmitr_flwr.merging.task_vectors import wudi
from fedmitr_flwr.vit.build import initial_weights, vit_of

CONFIG = settings()
CLASSES = CONFIG.model.num_classes
IMAGES = some_images(CONFIG, 40)


def test_the_students_start() -> None:
    """To the bit, also where it is to get another head."""
    uploads, first, other = two_uploads(), initial_weights(CONFIG.model, 4), initial_weights(CONFIG.model, 5)
    mean, merged = average(uploads), wudi(uploads, first)
    assert not same(mean, merged)
    for init, wanted in {"average": mean, "classwise": mean, "wudi": merged, "initial": first}.items():
        config = settings(seed=4, **{"distill.init": init})
        assert same(start_student(uploads, config).state_dict(), wanted), init
    moved = start_student(uploads, settings(seed=4, **{"distill.init": "wudi"}), lambda: other)
    assert same(moved.state_dict(), wudi(uploads, other))


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


def merged(teachers: list[VisionTransformer], weights_KY: Tensor) -> VisionTransformer:
    student = a_vit(CONFIG, 9)
    merge_heads(student, Ensemble(teachers, weights_KY, "probs"), IMAGES)
    return student


def test_the_head_says_what_contrast_makes_of_the_clients_heads() -> None:
    """On the same features, but for one factor for each class; the body stays."""
    teachers, weights_KY = [a_vit(CONFIG, seed) for seed in range(3)], torch.rand(3, CLASSES, generator=stream(0))
    student, body = merged(teachers, weights_KY), a_vit(CONFIG, 9)
    features = body.forward_head(body.forward_features(IMAGES), pre_logits=True)
    contrast = Contrast(weights_KY)
    parts = torch.stack([contrast.part(k, teacher.head(features)) for k, teacher in enumerate(teachers)])
    logits = contrast.scores(parts.sum(0))
    spread = logits.std(0, correction=0)
    torch.testing.assert_close(student(IMAGES), logits * spread.mean() / spread, rtol=1e-4, atol=1e-5)
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
    assert {"likeness", "likeness_before"} <= set(line)
    spread = vit_of(CONFIG.model, told.weights)(told.pool.images[:10]).std(0, correction=0)  # of the first round's
    torch.testing.assert_close(spread, spread.mean().expand(CLASSES), rtol=1e-4, atol=1e-5)
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(told.weights[name], average(uploads)[name], rtol=0, atol=1e-6)
