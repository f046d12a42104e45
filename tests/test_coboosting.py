"""Co-Boosting's learned weights: signed steps by hand, at their limits, and inside the method."""

from typing import Any

import pytest
import torch
from tiny import fused, settings
from torch.nn import functional as F

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble import ensemble as ensemble_module
from fedmitr_flwr.ensemble.ensemble import combine_answers
from fedmitr_flwr.methods import coboosting as module
from fedmitr_flwr.methods.coboosting import learn, moved, slope

WAYS = ("logits", "probs")


@pytest.fixture
def unsoftened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble_module, "TEMPERATURE", 1.0)


def logits(*teachers: list[float]) -> torch.Tensor:
    """(K, 1, Y): each teacher's answer on one image."""
    return torch.tensor(teachers, dtype=torch.float64)[:, None]


@pytest.mark.usefixtures("unsoftened")
def test_the_slope_of_two_teachers_by_hand() -> None:
    """Mixture: CE = -log((w₀ p₀ + w₁ p₁) / (w₀ + w₁)) with p = 0.8 and 0.5 of the target, w = 0.5 and 0.25.

    dCE/dw_k = 1 / Σ w - p_k / Σ w p = 4/3 - p_k / 0.525.
    """
    answers = logits([0.8, 0.2], [0.5, 0.5]).log()
    found = slope(answers, torch.tensor([0]), torch.tensor([0.5, 0.25]).double(), "probs")
    assert found.tolist() == pytest.approx([4 / 3 - 0.8 / 0.525, 4 / 3 - 0.5 / 0.525])


def test_the_slope_of_logits_by_hand() -> None:
    """A = (2 w₀ / Σ w, 0): CE = log(1 + e^-a), a = 2 w₀ / Σ w; w = 0.5, 0.5: a = 1, dCE/da = -1 / (1 + e).

    da/dw₀ = 2 w₁ / (Σ w)² = 1, da/dw₁ = -2 w₀ / (Σ w)² = -1.
    """
    found = slope(logits([2.0, 0.0], [0.0, 0.0]), torch.tensor([0]), torch.tensor([0.5, 0.5]).double(), "logits")
    e = torch.tensor(1.0).exp().item()
    assert found.tolist() == pytest.approx([-1 / (1 + e), 1 / (1 + e)])


@pytest.mark.parametrize("combine", WAYS)
def test_the_slope_is_that_of_the_ensemble_s_own_cross_entropy(combine: str) -> None:
    rng = stream(0)
    answers = 3 * torch.randn(4, 6, 5, generator=rng, dtype=torch.float64)
    targets, weights = torch.randint(5, (6,), generator=rng), torch.rand(4, generator=rng, dtype=torch.float64) + 0.1

    def entropy(weights: torch.Tensor) -> float:
        shares_KY = (weights / weights.sum())[:, None].expand(-1, 5)
        return F.cross_entropy(combine_answers(answers, shares_KY, combine), targets).item()

    small = 1e-6
    steps = small * torch.eye(4, dtype=torch.float64)
    differences = [(entropy(weights + step) - entropy(weights - step)) / (2 * small) for step in steps]
    found = slope(answers, targets, weights, combine)
    assert found.tolist() == pytest.approx(differences, rel=1e-5, abs=1e-8)


def test_a_step_is_signed_and_clipped() -> None:
    weights = torch.tensor([0.5, 0.995, 0.004, 0.3]).double()
    found = moved(weights, torch.tensor([0.2, -7.0, 3.0, 0.0]).double(), 0.01)
    assert found.tolist() == pytest.approx([0.49, 1.0, 0.0, 0.3])


def test_weights_that_would_all_vanish_stay() -> None:
    weights = torch.tensor([0.005, 0.0]).double()
    assert torch.equal(moved(weights, torch.tensor([1.0, 1.0]).double(), 0.01), weights)


@pytest.mark.parametrize("combine", WAYS)
def test_a_teacher_without_weight_comes_back_if_it_is_right(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope at weight 0 is finite, also where the other teacher excludes the target altogether.

    That one moves from the second step on: alone, its weight makes no difference.
    """
    answers = logits([9.0, 0.0], [-900.0, 900.0])
    three = answers.expand(-1, 3, -1), torch.zeros(3, dtype=torch.long)
    monkeypatch.setattr(module, "STEP", 0.1)
    monkeypatch.setattr(module, "BATCH", 1)
    found = learn(*three, torch.tensor([0.0, 1.0]), combine, 0, stream(0))
    assert found.tolist() == pytest.approx([0.3, 0.8])


@pytest.fixture
def _batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)


def learned(answers: torch.Tensor, targets: torch.Tensor, combine: str = "probs") -> torch.Tensor:
    weights = torch.full((len(answers),), 1 / len(answers))
    return learn(answers, targets, weights, combine, 0, stream(0))


def experts(images: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher 0 is right, teacher 1 says nothing, teacher 2 is wrong: (3, M, 2) and targets (M,)."""
    targets = torch.arange(images) % 2
    right = 4 * F.one_hot(targets, 2).double()
    return torch.stack([right, torch.zeros_like(right), -right]), targets


@pytest.mark.usefixtures("_batches_of_four")
@pytest.mark.parametrize("combine", WAYS)
def test_steps_add_up_to_the_one_who_is_right(combine: str) -> None:
    """One pass over 20 images in batches of 4: five steps of 0.01, all in the same direction."""
    found = learned(*experts(), combine)
    assert found[0].item() == pytest.approx(1 / 3 + 0.05)
    assert found[2].item() == pytest.approx(1 / 3 - 0.05)
    assert learned(*experts(600), combine)[2] == 0


def test_equal_teachers_keep_equal_weights() -> None:
    answers, targets = experts(400)
    twins = answers[:1].expand(4, -1, -1)
    assert torch.equal(learned(twins, targets), torch.full((4,), 1 / 4).double())


def test_weights_are_learned_on_from_sizes_by_a_step_that_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch in each round: steps of 0.1, 0.05 and 0.025 against the slope on all images so far."""
    monkeypatch.setattr(module, "STEP", 0.1)
    monkeypatch.setattr(module, "DECAY", 0.5)
    log: list[dict[str, Any]] = []
    made = fused(settings(method="coboosting", **{"distill.rounds": 3}), lines=log)
    answers, wanted = made.ensemble.answers(made.pool.images).double(), torch.tensor([0.25, 0.75]).double()
    lines = [line for line in log if line["stage"] == "weights"]
    assert [line["round"] for line in lines] == [0, 1, 2]
    for r, line in enumerate(lines):
        seen = slice(0, 10 * (r + 1))
        towards = slope(answers[:, seen], made.pool.targets[seen], wanted, "logits")
        wanted = moved(wanted, towards, 0.1 * 0.5**r)
        torch.testing.assert_close(line["weights"], (wanted / wanted.sum()).float())
    torch.testing.assert_close(made.ensemble.weights, lines[-1]["weights"][:, None].expand(2, 10))
    assert (wanted - torch.tensor([0.25, 0.75])).abs().min() > 0.02


def test_without_a_step_the_weights_are_those_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 0.0)
    for start, wanted in (("size", [0.25, 0.75]), ("estimated", [0.25, 0.75]), ("uniform", [0.5, 0.5])):
        made = fused(settings(method="coboosting", **{"ensemble.weights": start}))
        assert made.ensemble.weights[:, 0].tolist() == pytest.approx(wanted)
