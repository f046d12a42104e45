"""The student's start, by setting; how like the ensemble it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import a_vit, an_upload, same, settings

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.distillation.start import answers, likeness, start_student
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.pool import Pool
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights


def two_uploads() -> list[Upload]:
    return [an_upload(settings(), client, 10 + client) for client in range(2)]


def a_pool(config: Config, teachers: list[Upload]) -> Pool:
    ensemble = Ensemble.of(teachers, config.model, config.ensemble)
    images = invert(ensemble, torch.arange(20) % 10, config.inversion, config.model, flip=False, rng=stream(0))
    return relabel(images, config.relabel.mode)


def test_the_students_start() -> None:
    """The average to the bit, also where it is to get another head."""
    mean = average(two_uploads())
    for init, wanted in {"average": mean, "classwise": mean, "initial": initial_weights(settings().model, 4)}.items():
        config = settings(seed=4, **{"distill.init": init})
        assert same(start_student(two_uploads(), config).state_dict(), wanted), init


def test_initial_is_what_the_clients_started_from(tmp_path: Path) -> None:
    there = {name: tensor.clone() for name, tensor in a_vit(settings(), 9).state_dict().items()}
    save_file(there, tmp_path / "weights.safetensors")
    config = settings(**{"distill.init": "initial", "model.weights": str(tmp_path / "weights.safetensors")})
    student = start_student([an_upload(config, 0)], config).state_dict()
    assert same(student, there)


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
