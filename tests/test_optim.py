"""One optimisation step: the learning rate's path, what decays and what does not, clipping."""

import math

import pytest
import torch
from tiny import a_vit, same, settings
from torch import nn

from fedmitr_flwr.vit import optim
from fedmitr_flwr.vit.optim import Stepper, client_stepper

every = pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither decay nor clipping, but in their own tests."""
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(optim, "GRAD_CLIP", math.inf)


def a_parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values]))


def test_sgd_with_momentum_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 1 at each step, lr 1/2, 3/8 and 1/8, momentum 0.9: velocities 1, 1.9, 2.71.

    AdamW's first step has the length of the learning rate. A gradient (3, 4) over two parameters is cut from length 5.
    """
    parameter = a_parameter(0.0)
    stepper = Stepper([parameter], "sgd", 0.5, total_steps=3)
    for wanted in (-0.5, -1.2125, -1.55125):
        stepper.step(parameter.sum())
        assert parameter.item() == pytest.approx(wanted)
    parameter = a_parameter(1.0, 1.0)
    Stepper([parameter], "adamw", 0.01, total_steps=1).step((parameter * torch.tensor([[5.0, -1e-3]])).sum())
    assert parameter[0].tolist() == pytest.approx([0.99, 1.01], abs=1e-6)
    for limit, moved in ((1.0, [-0.3, -0.4]), (10.0, [-1.5, -2.0])):
        monkeypatch.setattr(optim, "GRAD_CLIP", limit)
        first, second = a_parameter(0.0), a_parameter(0.0)
        Stepper([first, second], "sgd", 0.5, total_steps=1).step(3 * first.sum() + 4 * second.sum())
        assert [first.item(), second.item()] == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_step_of_muon_is_orthogonal_and_has_the_size_of_adamw(scale: float) -> None:
    """Of a gradient U S Vᵀ, of shape (A, B), it is U Vᵀ · 0.2 lr √max(A, B); singular values are near 1 only."""
    gradient = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    matrix, bias = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(3))
    stepper = Stepper([matrix, bias], "muon", 0.01, total_steps=1)
    stepper.step((matrix * gradient).sum() + bias.sum())
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    step = left.T @ -matrix.detach() @ right.T / (0.01 * 0.2 * math.sqrt(6))
    assert ((step.diagonal() > 0.65) & (step.diagonal() < 1.25)).all()
    assert (step - torch.diag(step.diagonal())).abs().max() < 0.05
    assert bias.tolist() == pytest.approx([-0.01] * 3, rel=1e-4)


@every
def test_cosine_is_half_in_the_middle_and_zero_at_the_end(optimizer: str) -> None:
    """It stays at zero, and does not rise again."""
    parameter = a_parameter(1.0)
    stepper = Stepper([parameter], optimizer, 0.5, total_steps=8)
    rates, values = [], []
    for _ in range(11):
        rates.append({rate for each in stepper.schedules for rate in each.get_last_lr()})
        values.append(parameter.item())
        stepper.step(parameter.sum())
    cosine = [0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [rate for (rate,) in rates] == pytest.approx([*cosine, 0, 0, 0])
    assert values[8:] == [parameter.item()] * 3


@every
def test_biases_norms_positions_and_class_tokens_do_not_decay(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.5)
    vit = a_vit(settings(), 0)
    before = {name: tensor.detach().clone() for name, tensor in vit.named_parameters()}
    Stepper(vit.parameters(), optimizer, 0.1, total_steps=1).step(sum(p.sum() * 0 for p in vit.parameters()))
    spared = vit.no_weight_decay() | {name for name in before if name.endswith("bias") or "norm" in name}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= spared
    assert {"head.weight", "patch_embed.proj.weight", "blocks.1.mlp.fc1.weight"}.isdisjoint(spared)
    for name, parameter in vit.named_parameters():
        wanted = before[name] if name in spared else 0.95 * before[name]  # 1 - lr · decay
        torch.testing.assert_close(parameter.data, wanted, msg=name)


@every
def test_a_head_may_learn_at_a_rate_of_its_own(optimizer: str) -> None:
    """Every gradient is 1: the first step of SGD and of AdamW is the rate. By the body's the head is of it."""
    for head_lr in (0.5, 0.01):
        vit, before = a_vit(settings(), 0), dict(a_vit(settings(), 0).named_parameters())
        changes = {"optimizer": optimizer, "lr": 0.01, "head-lr": head_lr}
        local = settings(**{f"local.{name}": value for name, value in changes.items()}).local
        stepper = client_stepper(vit, local, total_steps=4)
        stepper.step(sum(parameter.sum() for parameter in vit.parameters()))
        steps = {name: (before[name] - parameter).detach() for name, parameter in vit.named_parameters()}
        names = ["head.bias", "norm.bias", "cls_token"] if optimizer == "muon" else list(steps)
        for name in names + ["head.weight"] * (head_lr != 0.01):
            wanted = torch.full_like(steps[name], head_lr if name.startswith("head.") else 0.01)
            torch.testing.assert_close(steps[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
        falling = 0.5 * (1 + math.cos(math.pi / 4))
        rates = {rate for each in stepper.schedules for rate in each.get_last_lr()}
        assert sorted(rates) == pytest.approx(sorted({0.01 * falling, head_lr * falling}))


@every
def test_a_restored_stepper_goes_on_in_the_same_bits(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.1)
    monkeypatch.setattr(optim, "GRAD_CLIP", 1.0)

    def go(stepper: Stepper, steps: range) -> Stepper:
        for step in steps:
            stepper.step(sum(((parameter - step) ** 2).sum() for parameter in stepper.parameters))
        return stepper

    def started(at: list[nn.Parameter]) -> Stepper:
        return Stepper([nn.Parameter(each.detach().clone()) for each in at], optimizer, 0.1, total_steps=6)

    start = [a_parameter(1.0, -2.0), nn.Parameter(torch.tensor([3.0])), a_parameter(0.5)]
    whole = go(started(start), range(6))
    for done in (0, 1, 3, 6):
        first = go(started(start), range(done))
        state = {name: value.clone() for name, value in first.state().items()}
        assert state["steps"] == done
        second = started(first.parameters)
        second.restore(first.state())
        assert second.schedules[0].get_last_lr() == first.schedules[0].get_last_lr()
        go(second, range(done, 6))
        for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
            assert torch.equal(ours, theirs)
        assert same(first.state(), state)  # the first one's are its own
        assert second.schedules[0].get_last_lr() == whole.schedules[0].get_last_lr()
