"""The student's start: by setting, moved along the clients' way, and chosen on the first images."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import a_vit, an_upload, fused, same, settings

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.distillation.start import FACTORS, answers, choose_start, likeness, start_student
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.pool import Pool
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import Weights, initial_weights


def two_uploads() -> list[Upload]:
    return [an_upload(settings(), client, 10 + client) for client in range(2)]


def placed(factor: float) -> Weights:
    """w⁰ + factor · (w̄ - w⁰), as it is written."""
    start, mean = initial_weights(settings().model, settings().seed), average(two_uploads())
    return {name: (start[name] + factor * (mean[name].double() - start[name])).float() for name in mean}


def a_pool(config: Config, teachers: list[Upload]) -> Pool:
    ensemble = Ensemble.of(teachers, config.model, config.ensemble)
    images = invert(ensemble, torch.arange(20) % 10, config.inversion, config.model, flip=False, rng=stream(0))
    return relabel(images, config.relabel.mode)


def test_the_students_start() -> None:
    """The average to the bit, also where it is to be moved or to get another head; another start is not moved."""
    mean, start = average(two_uploads()), initial_weights(settings().model, 4)
    for init, factor, wanted in (
        ("average", 1.0, mean),
        ("average", 0.0, mean),
        ("classwise", 1.0, mean),
        ("initial", 0.0, start),
        ("initial", 2.0, start),
    ):
        config = settings(seed=4, **{"distill.init": init, "distill.extrapolate": factor})
        assert same(start_student(two_uploads(), config).state_dict(), wanted), init
        assert config.distill.chooses_start == (init == "average" and factor == 0)


def test_initial_is_what_the_clients_started_from(tmp_path: Path) -> None:
    there = {name: tensor.clone() for name, tensor in a_vit(settings(), 9).state_dict().items()}
    save_file(there, tmp_path / "weights.safetensors")
    config = settings(**{"distill.init": "initial", "model.weights": str(tmp_path / "weights.safetensors")})
    student = start_student([an_upload(config, 0)], config).state_dict()
    assert same(student, there)


@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_the_average_is_moved_along_the_clients_way(factor: float) -> None:
    student = start_student(two_uploads(), settings(**{"distill.extrapolate": factor})).state_dict()
    for name, wanted in placed(factor).items():
        torch.testing.assert_close(student[name], wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("number", range(len(FACTORS)))
def test_the_factor_at_which_the_teacher_stands_is_chosen(number: int, caplog: pytest.LogCaptureFixture) -> None:
    factor, pri4 = FACTORS[number], {"inversion.mode": "pri4", "relabel.mode": "drop"}
    config = settings(**(pri4 if number % 2 else {}), **{"distill.extrapolate": 0.0})
    teachers = [replace(two_uploads()[0], weights=placed(factor))]
    pool = a_pool(config, teachers)
    student = start_student(two_uploads(), config)
    told = answers(Ensemble.of(teachers, config.model, config.ensemble), pool)
    before = likeness(student, told, pool)
    with caplog.at_level(logging.INFO, "fedmitr"):
        assert choose_start(student, told, pool, config) == factor
    assert likeness(student, told, pool) == pytest.approx(1, abs=1e-5)
    assert factor == 1 or before < 1 - 1e-4
    for name, wanted in placed(factor).items():
        torch.testing.assert_close(student.state_dict()[name], wanted, rtol=0, atol=1e-6, msg=name)
    assert f"starts at {factor:g} times" in caplog.text
    assert factor != 1 or same(student.state_dict(), average(two_uploads()))


@torch.no_grad()
def test_likeness_is_the_correlation_of_answers_on_whole_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By numpy's Pearson correlation over the classes."""
    config = settings(**{"inversion.mode": "dense"})
    with torch.enable_grad():
        pool = a_pool(config, two_uploads())
    ensemble = Ensemble.of(two_uploads(), config.model, config.ensemble)
    student = a_vit(config, 9)
    both = zip(ensemble(pool.images).numpy(), student(pool.images).numpy(), strict=True)
    wanted = np.mean([np.corrcoef(one, other)[0, 1] for one, other in both])
    for batch_size in (7, 20, 256):
        monkeypatch.setattr("fedmitr_flwr.distillation.start.BATCH", batch_size)
        assert likeness(student, answers(ensemble, pool), pool) == pytest.approx(wanted, rel=1e-5)


def test_fedmitr_chooses_on_its_first_images_and_goes_on_as_if_it_had_been_told() -> None:
    metrics: list[dict[str, Any]] = []
    chosen = fused(settings(**{"distill.extrapolate": 0.0, "distill.rounds": 2}), two_uploads(), metrics)
    (factor,) = [line["extrapolate"] for line in metrics if line["stage"] == "start"]
    metrics.clear()
    for other in (factor, next(other for other in FACTORS if other != factor)):
        told = fused(settings(**{"distill.extrapolate": other, "distill.rounds": 2}), two_uploads(), metrics)
        assert same(told.weights, chosen.weights) == (other == factor)
    assert not [line for line in metrics if line["stage"] == "start"]
