"""The student's start: by setting, moved along the clients' way, and chosen on the first images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import a_vit, an_upload, settings

from fedmitr_flwr.distillation.start import start_student
from fedmitr_flwr.errors import ModelError
from fedmitr_flwr.training.average import average
from fedmitr_flwr.training.upload import Weights
from fedmitr_flwr.vit.build import initial_weights


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


def test_pretrained_weights_that_are_not_there_are_refused() -> None:
    config = settings(**{"distill.init": "pretrained", "distill.pretrained": "/no/where.safetensors"})
    with pytest.raises(ModelError, match=r"distill\.init = 'pretrained': .*cannot read /no/where\.safetensors"):
        start_student([an_upload(config, 0)], config)
    with pytest.raises(ModelError, match=r"distill\.init = 'pretrained': .* none for model\.name = 'small'"):
        start_student([], settings(**{"distill.init": "pretrained", "distill.pretrained": "timm"}))
