"""The robust ensemble: medians and trimmed means by numpy, by hand, and in every place where teachers are asked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean
from tiny import a_vit, an_upload, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.ensemble.routing import everyone, route
from fedmitr_flwr.ensemble.trim import trimmed
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.vit.tokens import all_positions, forward_cls, patchify


def combined(probabilities_K: Tensor, weights_K: Tensor, share: float) -> Tensor:
    return (trimmed(probabilities_K, weights_K, share) * probabilities_K).sum(0)


def equal(teachers: int) -> Tensor:
    return torch.full((teachers, 1), 1 / teachers, dtype=torch.float64)


def answers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "answers"), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(0, 99))
def test_half_is_the_median(teachers: int, seed: int) -> None:
    p = answers(seed, teachers, 4, 3).softmax(-1)
    np.testing.assert_allclose(combined(p, equal(teachers)[..., None], 0.5), np.median(p.numpy(), axis=0), rtol=1e-9)


@given(st.integers(3, 12), st.integers(1, 5), st.integers(0, 99))
def test_equal_weights_give_the_trimmed_mean(teachers: int, cut: int, seed: int) -> None:
    cut = min(cut, (teachers - 1) // 2)
    p = answers(seed, teachers, 4, 3).softmax(-1)
    # Just above, or scipy's share · K might round down.
    expected = trim_mean(p.numpy(), cut / teachers + 1e-9, axis=0)
    np.testing.assert_allclose(combined(p, equal(teachers)[..., None], cut / teachers), expected, rtol=1e-9)


def test_weights_are_cut_through() -> None:
    """Ordered answers 0.1, 0.2, 0.6, 0.9 with weights 0.3, 0.2, 0.4, 0.1; 0.2 of the weight is cut off at each end.

    Of the first 0.1 is left, of the second 0.2, of the third 0.3 and of the fourth nothing: 0.6 in all.
    """
    p = torch.tensor([[0.6], [0.1], [0.9], [0.2]], dtype=torch.float64)
    weights = torch.tensor([[0.4], [0.3], [0.1], [0.2]], dtype=torch.float64)
    expected = [[0.3 / 0.6], [0.1 / 0.6], [0.0], [0.2 / 0.6]]
    torch.testing.assert_close(trimmed(p, weights, 0.2), torch.tensor(expected, dtype=torch.float64))
    # The weighted median: the middle of the weight lies at the end of 0.2 and at the beginning of 0.6.
    assert combined(p, weights, 0.5).item() == pytest.approx(0.4)


@given(st.integers(2, 8), st.integers(0, 99), st.floats(0, 0.5))
def test_weights_stay_weights(teachers: int, seed: int, share: float) -> None:
    p = answers(seed, teachers, 5, 3).softmax(-1)
    weights = answers(seed + 1, teachers, 1, 3).softmax(0)
    kept = trimmed(p, weights, share)
    assert (kept >= 0).all()
    torch.testing.assert_close(kept.sum(0), torch.ones(5, 3, dtype=torch.float64))
    if share == 0:
        torch.testing.assert_close(kept, weights.expand_as(kept))


@given(st.integers(0, 99), st.floats(0.25, 0.5), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_liars_with_less_than_the_share_cannot_leave_the_range_of_the_others(
    seed: int, share: float, lies: list[float]
) -> None:
    """Two of ten: whatever they say, each class gets what lies between the honest ones' least and greatest."""
    honest = answers(seed, 8, 1).sigmoid()
    p = torch.cat([honest, torch.tensor(lies, dtype=torch.float64)[:, None]])
    found = combined(p, equal(10), share)
    assert honest.min() - 1e-12 <= found <= honest.max() + 1e-12


def ensemble(config: Config, teachers: int = 5) -> Ensemble:
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(teachers)]
    return Ensemble.of(uploads, config.model, config.ensemble)


def robust(**changes: object) -> Config:
    return settings(**{"ensemble.combine": "probs", "ensemble.trim": 0.25, **changes})


@torch.no_grad()
def expected_scores(config: Config, images: Tensor) -> Tensor:
    """From each teacher alone."""
    every = torch.stack([a_vit(config, k)(images) for k in range(5)]).double().softmax(-1)
    weights = ensemble(config).weights.double()[:, None]
    return combined(every, weights, config.ensemble.trim).log()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("stack", ["never", "always"])
def test_whole_images_and_tokens_are_answered_by_the_trimmed_mean(share: float, stack: str) -> None:
    config = robust(**{"ensemble.trim": share, "ensemble.stack": stack})
    images = some_images(config, 6)
    found, patches = ensemble(config), patchify(images, 2)
    expected = expected_scores(config, images).float()
    torch.testing.assert_close(found(images), expected, atol=1e-4, rtol=1e-4)
    scores = found.scores(patches, all_positions(patches))
    torch.testing.assert_close(scores.cls, expected, atol=1e-4, rtol=1e-4)
    assert scores.patches.shape == (6, 16, 10)
    mean = ensemble(robust(**{"ensemble.trim": 0.0})).scores(patches, all_positions(patches))
    assert not torch.allclose(scores.patches, mean.patches, atol=1e-3)


def total(scores: Tensor, _: Tensor) -> Tensor:
    return scores.log_softmax(-1)[:, 3]


@pytest.mark.parametrize("chunk", [0, 2])
def test_the_gradient_is_that_of_the_trimmed_mean_also_when_teachers_are_streamed(chunk: int) -> None:
    config = robust(**{"ensemble.teacher-chunk": chunk})
    found = ensemble(config)
    assert bool(found.teachers.streamed) == bool(chunk)
    patches = patchify(some_images(config, 4), 2)
    positions = all_positions(patches)
    loss, gradient = found.slope(total, patches, positions, everyone(found.weights))
    leaf = patches.clone().requires_grad_()
    logits = torch.stack([forward_cls(a_vit(config, k), leaf, positions).logits for k in range(5)])
    kept = trimmed(logits.softmax(-1), found.weights[:, None], 0.25)
    scores = (kept * logits.softmax(-1)).sum(0).log()
    (expected,) = torch.autograd.grad(total(scores, leaf).sum(), leaf)
    torch.testing.assert_close(loss, total(scores, leaf).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
    # And by finite differences, along the gradient.
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    ahead, behind = (found.slope(total, patches + s, positions, everyone(found.weights))[0] for s in (step, -step))
    torch.testing.assert_close((ahead - behind) / 2e-2, gradient.flatten(1).norm(dim=1), atol=1e-3, rtol=0.05)


def test_importance_is_of_the_teachers_that_are_left() -> None:
    """Where one teacher alone is left for the target, it is that teacher's attention."""
    config = robust(**{"ensemble.trim": 0.5, "ensemble.weights": "uniform"})
    found, patches = ensemble(config), patchify(some_images(config, 3), 2)
    positions, targets = all_positions(patches), torch.tensor([0, 4, 9])
    importance = found.importance(patches, positions, targets)
    for image, target in enumerate(targets):
        every = [forward_cls(a_vit(config, k), patches[[image]], positions[[image]]) for k in range(5)]
        sure = torch.cat([answer.logits.softmax(-1)[:, target] for answer in every])
        middle = int(sure.argsort()[2])
        torch.testing.assert_close(importance[image], every[middle].attention[0], atol=1e-5, rtol=1e-4)


def test_teachers_that_are_not_asked_are_not_in_the_order() -> None:
    config = robust()
    found = ensemble(config, 3)
    weights = torch.tensor([[0.6] * 10, [0.4] * 10, [0.0] * 10])
    patches = patchify(some_images(config, 4), 2)
    routing = route(weights, torch.tensor([0, 1, 2, 3]), 0.5)
    assert set(routing.rows) == {0, 1}
    two = Ensemble([a_vit(config, 0), a_vit(config, 1)], weights[:2], "probs", trim=0.25)
    for ours, theirs in zip(
        found.slope(total, patches, all_positions(patches), routing),
        two.slope(total, patches, all_positions(patches), everyone(weights[:2])),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_an_inversion_runs_on_it() -> None:
    def loss(steps: int) -> Tensor:
        config = robust(**{"inversion.steps": steps, "inversion.stops": ""})
        found, classes, rng = ensemble(config), torch.arange(10), stream(0, "inversion")
        made = invert(found, classes, config.inversion, config.model, flip=False, rng=rng)
        assert torch.isfinite(made.images).all()
        return made.loss.mean()

    assert loss(30) < loss(1) - 0.3
