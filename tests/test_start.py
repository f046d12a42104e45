"""The student's start: by setting, moved along the clients' way, and chosen on the first images."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import a_vit, an_upload, settings

from fedmitr_flwr import methods
from fedmitr_flwr.common.errors import ConfigError, ModelError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation.pool import Pool
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.distillation.start import FACTORS, choose_start, likeness, start_student
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import Weights, initial_weights


def two_uploads() -> list[Upload]:
    return [an_upload(settings(), client, 10 + client) for client in range(2)]


def placed(factor: float) -> Weights:
    """w⁰ + factor · (w̄ - w⁰), as it is written."""
    start, mean = initial_weights(settings().model, settings().seed), average(two_uploads())
    return {name: (start[name] + factor * (mean[name].double() - start[name])).float() for name in mean}


def a_pool(config: Config, teachers: list[Upload], count: int = 20) -> Pool:
    ensemble = Ensemble.of(teachers, config.model, config.ensemble)
    images = invert(ensemble, torch.arange(count) % 10, config.inversion, config.model, flip=False, rng=stream(0))
    return Pool.of(images, relabel(ensemble, images, config.relabel))


def test_the_students_start(tmp_path: Path) -> None:
    uploads = [an_upload(settings(), client, 10 + client) for client in range(2)]
    there = {name: tensor.clone() for name, tensor in a_vit(settings(), 9).state_dict().items()}
    save_file(there, tmp_path / "weights.safetensors")
    wanted: dict[str, Weights] = {
        "average": average(uploads),
        "initial": initial_weights(settings(seed=4).model, 4),
        "pretrained": there,
    }
    for init, weights in wanted.items():
        path = str(tmp_path / "weights.safetensors")
        config = settings(seed=4, **{"distill.init": init, "distill.pretrained": path})
        student = start_student(uploads, config).state_dict()
        assert all(torch.equal(student[name], tensor) for name, tensor in weights.items()), init


def test_initial_is_what_the_clients_started_from(tmp_path: Path) -> None:
    there = {name: tensor.clone() for name, tensor in a_vit(settings(), 9).state_dict().items()}
    save_file(there, tmp_path / "weights.safetensors")
    config = settings(**{"distill.init": "initial", "model.weights": str(tmp_path / "weights.safetensors")})
    student = start_student([an_upload(config, 0)], config).state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in there.items())


@pytest.mark.parametrize("method", ["fedmitr", "adi", "dense", "coboosting", "feddf"])
def test_weights_that_are_not_there_are_known_before_any_client_is_asked(method: str, tmp_path: Path) -> None:
    flat = {"method": method, "distill.init": "pretrained", "data.proxy": 0.1}
    with pytest.raises(
        ConfigError, match=r"there are no timm weights for model\.name = 'small'; set distill\.pretrained"
    ):
        methods.check(settings(**flat))
    flat["distill.pretrained"] = str(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"distill\.pretrained = '.*x\.safetensors': there is no such file"):
        methods.check(settings(**flat))
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ModelError, match=r"distill\.pretrained: .*x\.safetensors is empty"):
        methods.check(settings(**flat))
    save_file(dict(a_vit(settings(), 9).state_dict()), tmp_path / "y.safetensors")
    methods.check(settings(**flat | {"distill.pretrained": str(tmp_path / "y.safetensors")}))


def test_pretrained_weights_that_are_not_there_are_refused() -> None:
    config = settings(**{"distill.init": "pretrained", "distill.pretrained": "/no/where.safetensors"})
    with pytest.raises(ModelError, match=r"distill\.pretrained: there is no weights file /no/where\.safetensors"):
        start_student([an_upload(config, 0)], config)
    with pytest.raises(ModelError, match=r"distill\.pretrained = 'timm', but there are none for model\.name = 'small'"):
        start_student([], settings(**{"distill.init": "pretrained", "distill.pretrained": "timm"}))


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.5, 2.0, 3.0])
def test_the_average_is_moved_along_the_clients_way(factor: float) -> None:
    student = start_student(two_uploads(), settings(**{"distill.extrapolate": factor})).state_dict()
    for name, wanted in placed(factor).items():
        torch.testing.assert_close(student[name], wanted, rtol=0, atol=1e-6, msg=name)


def test_twice_the_way_is_the_start_mirrored_at_the_average() -> None:
    student = start_student(two_uploads(), settings(**{"distill.extrapolate": 2.0})).state_dict()
    start = initial_weights(settings().model, settings().seed)
    for name, mean in average(two_uploads()).items():
        torch.testing.assert_close((student[name] + start[name]) / 2, mean, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_the_plain_average_and_what_is_to_be_chosen_from_are_the_average_to_the_bit(factor: float) -> None:
    config = settings(**{"distill.extrapolate": factor})
    student = start_student(two_uploads(), config).state_dict()
    assert all(torch.equal(student[name], tensor) for name, tensor in average(two_uploads()).items())
    assert config.distill.chooses_start == (factor == 0)


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_another_start_is_not_moved(factor: float) -> None:
    config = settings(**{"distill.init": "initial", "distill.extrapolate": factor})
    student = start_student(two_uploads(), config).state_dict()
    wanted = initial_weights(config.model, config.seed)
    assert all(torch.equal(student[name], tensor) for name, tensor in wanted.items())
    assert not config.distill.chooses_start


@pytest.mark.parametrize(
    "changes", [{}, {"relabel.mode": "complement"}, {"inversion.mode": "pri", "relabel.mode": "drop"}]
)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_factor_at_which_the_teacher_stands_is_chosen(
    factor: float, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(**changes, **{"distill.extrapolate": 0.0})
    pool = a_pool(config, [replace(two_uploads()[0], weights=placed(factor))])
    student = start_student(two_uploads(), config)
    before = likeness(student, pool)
    with caplog.at_level(logging.INFO, "fedmitr"):
        assert choose_start(student, pool, config) == factor
    assert likeness(student, pool) == pytest.approx(1, abs=1e-5)
    assert factor == 1 or before < 1 - 1e-4
    for name, wanted in placed(factor).items():
        torch.testing.assert_close(student.state_dict()[name], wanted, rtol=0, atol=1e-6, msg=name)
    assert f"starts at {factor:g} times" in caplog.text


def test_a_chosen_average_has_its_bits() -> None:
    config = settings(**{"distill.extrapolate": 0.0})
    student = start_student(two_uploads(), config)
    assert choose_start(student, a_pool(config, [replace(two_uploads()[0], weights=placed(1.0))]), config) == 1
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in average(two_uploads()).items())


@torch.no_grad()
def test_likeness_is_the_correlation_of_answers_on_whole_images() -> None:
    """By numpy's Pearson correlation over the classes, with the views as they are and the ensemble asked again."""
    config = settings(**{"inversion.mode": "dense", "ensemble.combine": "probs"})
    with torch.enable_grad():
        pool = a_pool(config, two_uploads())
    ensemble = Ensemble.of(two_uploads(), config.model, config.ensemble)
    student = a_vit(config, 9)
    answers = zip(ensemble(pool.images).numpy(), student(pool.images).numpy(), strict=True)
    wanted = np.mean([np.corrcoef(one, other)[0, 1] for one, other in answers])
    for batch_size in (7, 20, 256):
        assert likeness(student, pool, batch_size) == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_likeness_does_not_see_how_long_answers_are() -> None:
    config = settings(**{"inversion.mode": "dense"})
    with torch.enable_grad():
        pool = a_pool(config, two_uploads())
    student = a_vit(config, 9)
    before = likeness(student, pool)
    student.head.weight *= 3
    student.head.bias.mul_(3).add_(5)
    assert likeness(student, pool) == pytest.approx(before, rel=1e-5)


def fused(metrics: list[dict[str, Any]], **changes: object) -> Fused:
    job = Job(two_uploads(), settings(**changes), torch.device("cpu"), lambda **values: metrics.append(values))
    return methods.load("fedmitr").fuse(job)


def test_fedmitr_chooses_on_its_first_images_and_goes_on_as_if_it_had_been_told() -> None:
    metrics: list[dict[str, Any]] = []
    chosen = fused(metrics, **{"distill.extrapolate": 0.0, "distill.epochs": 2})
    (factor,) = [line["extrapolate"] for line in metrics if line["stage"] == "start"]
    assert factor in FACTORS
    metrics.clear()
    for other in FACTORS:
        told = fused(metrics, **{"distill.extrapolate": other, "distill.epochs": 2})
        same = [torch.equal(told.weights[name], tensor) for name, tensor in chosen.weights.items()]
        assert all(same) if other == factor else not all(same)
    assert not [line for line in metrics if line["stage"] == "start"]
