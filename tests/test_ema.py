"""The moving average of the student's weights: by hand, in closed form, off, kept, and what a method gives back."""

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny import a_vit, an_ensemble, an_upload, settings, some_images
from torch import Tensor, nn

from fedmitr_flwr import methods
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation.distil import count_batches, distil
from fedmitr_flwr.distillation.ema import Ema
from fedmitr_flwr.distillation.pool import Pool
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.vit.optim import Stepper


class Scalar(nn.Module):
    """A network of one weight."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def averaged(ema: Ema, values: list[float]) -> float:
    """What is written after these weights, one after the other."""
    network = Scalar()
    for value in values:
        network.w.data.fill_(value)
        ema.update(network)
    ema.write(network)
    return network.w.item()


@pytest.mark.parametrize(
    ("decay", "steps"),
    [
        (0.9, [1, 20 / 11, 38 / 11]),  # 2/11 · 1 + 9/11 · 2, then 3/12 of that + 9/12 · 4
        (0.2, [1, 20 / 11, 0.2 * 20 / 11 + 0.8 * 4]),  # 3/12 is more than 0.2
        (0.1, [1, 1.9, 3.79]),
        (0.0, [1, 2, 4]),
    ],
)
def test_by_hand(decay: float, steps: list[float]) -> None:
    for count, wanted in enumerate(steps, 1):
        assert averaged(Ema(decay), [1.0, 2.0, 4.0][:count]) == pytest.approx(wanted, rel=1e-12)


def test_without_a_limit_a_ramp_is_averaged_to_nine_tenths() -> None:
    """w_t = t: w̄ = 0.9 t solves w̄ ← ((1 + t) w̄ + 9 (t + 1)) / (10 + t), and the first step is soon forgotten."""
    assert averaged(Ema(1.0), [float(step) for step in range(1, 101)]) == pytest.approx(90, rel=1e-9)


def test_far_along_the_decay_is_the_limit() -> None:
    """A ramp lags behind by decay / (1 - decay) steps."""
    assert averaged(Ema(0.75), [float(step) for step in range(1, 201)]) == pytest.approx(197, rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.999, 1.0])
def test_constant_weights_stay_to_the_bit(decay: float) -> None:
    network, same, ema = a_vit(settings(), 0), a_vit(settings(), 0), Ema(decay)
    for _ in range(30):
        ema.update(network)
    ema.write(network)
    for name, tensor in same.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def test_off_keeps_and_writes_nothing() -> None:
    network, same, ema = a_vit(settings(), 0), a_vit(settings(), 0), Ema(0.0)
    ema.update(a_vit(settings(), 1))
    assert ema.state() == {}
    ema.restore({}, network)
    ema.write(network)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in same.state_dict().items())


def test_kept_and_restored_it_goes_on_with_the_same_bits() -> None:
    networks = [a_vit(settings(), seed) for seed in range(6)]
    whole, first, second = Ema(0.4), Ema(0.4), Ema(0.4)
    for network in networks:
        whole.update(network)
    for network in networks[:3]:
        first.update(network)
    kept = load(save(first.state()))
    second.restore(kept, networks[0])
    for network in networks[3:]:
        second.update(network)
    assert whole.state().keys() == second.state().keys()
    for name, tensor in whole.state().items():
        assert torch.equal(second.state()[name], tensor), name
    assert all(torch.equal(kept[name], tensor) for name, tensor in first.state().items())  # the state is a copy


def a_pool(config: Config) -> Pool:
    ensemble = an_ensemble(config)
    images = invert(ensemble, torch.arange(10), config.inversion, config.model, flip=False, rng=stream(0))
    return Pool.of(images, relabel(ensemble, images, config.relabel))


def test_distillation_goes_on_from_the_weights_themselves() -> None:
    """The student has the same bits with and without; the average is that of its weights after each step."""
    config = settings(**{"distill.passes": 3, "distill.batch-size": 4})
    pool = a_pool(config)
    steps: list[list[Tensor]] = []
    students = [a_vit(config, 7), a_vit(config, 7)]
    ema = Ema(0.3)
    for student, average in zip(students, (None, ema), strict=True):
        stepper = Stepper(student.parameters(), config.distill, count_batches(pool.views, config))

        def on_batch(*_: Any, student: nn.Module = student) -> None:
            steps.append([weight.detach().double() for weight in student.parameters()])

        distil(student, an_ensemble(config), pool, config, stepper, stream(1), on_batch=on_batch, ema=average)
    one, other = (student.state_dict() for student in students)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(steps) == 2 * 9
    ema.write(students[1])
    for written, wanted in zip(students[1].parameters(), by_definition(steps[9:], 0.3), strict=True):
        torch.testing.assert_close(written.double(), wanted, rtol=0, atol=1e-6)
    assert not torch.equal(students[0].head.weight, students[1].head.weight)


def by_definition(steps: list[list[Tensor]], decay: float) -> list[Tensor]:
    mean = steps[0]
    for seen, weights in enumerate(steps[1:], 1):
        d = min(decay, (1 + seen) / (10 + seen))
        mean = [d * old + (1 - d) * new for old, new in zip(mean, weights, strict=True)]
    return mean


def fused(config: Config) -> Fused:
    uploads = [an_upload(config, client, 10 + 20 * client) for client in range(2)]
    return methods.load("fedmitr").fuse(Job(uploads, config, torch.device("cpu"), lambda **_: None))


def test_fedmitr_gives_back_the_average_over_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[Tensor]] = []
    step = Stepper.step

    def spy(stepper: Stepper, loss: Tensor) -> None:
        step(stepper, loss)
        steps.append([weight.detach().double() for weight in stepper.parameters])

    monkeypatch.setattr(Stepper, "step", spy)
    changes = {"distill.epochs": 2, "distill.passes": 2, "distill.schedule": "constant"}
    plain = fused(settings(**changes))
    last = steps[-1]
    steps.clear()
    made = fused(settings(**changes, **{"distill.ema": 0.9}))
    assert len(steps) == 2 * (2 + 3)
    assert all(torch.equal(weight, same) for weight, same in zip(steps[-1], last, strict=True))
    student = a_vit(settings(), 5)
    student.load_state_dict(made.weights)
    for written, wanted in zip(student.parameters(), by_definition(steps, 0.9), strict=True):
        torch.testing.assert_close(written.double(), wanted, rtol=0, atol=1e-6)
    assert not torch.equal(made.weights["head.weight"], plain.weights["head.weight"])
    with torch.no_grad():
        images = some_images(settings(), 3)
        assert torch.equal(made.predict(images), student(images))
