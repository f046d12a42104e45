"""The distillation loss by hand, its limits, and the labels' noise that relabelling takes out of its gradient."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation import losses
from fedmitr_flwr.distillation.losses import Labels, distillation_loss, logit_distance, soft_divergence
from fedmitr_flwr.vit.tokens import TokenLogits

B, J, Y = 4, 6, 3


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No temperature, and patch tokens that count as the class token does."""
    for name in ("TOKEN", "TEMPERATURE", "LOW_TEMPERATURE"):
        monkeypatch.setattr(losses, name, 1.0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=stream(seed))


def student() -> TokenLogits:
    return TokenLogits(normal(B, Y, seed=0).requires_grad_(), normal(B, J, Y, seed=100).requires_grad_())


def teacher(seed: int = 10) -> TokenLogits:
    return TokenLogits(normal(B, Y, seed=seed), normal(B, J, Y, seed=seed + 1))


def labels(dense: Tensor | None = None, share: Tensor | None = None, **changes: Tensor) -> Labels:
    """Of whole images: `dense` patches keep the class, the others are relabelled."""
    share = torch.ones(B) if share is None else share
    made = Labels(
        targets=torch.tensor([0, 2, 1, 1]),
        hard=torch.ones(B),
        share=share,
        own=share[:, None].expand(B, J),
        dense=torch.ones(B, J) if dense is None else dense,
    )
    return made._replace(**changes)


def half() -> Tensor:
    """(B, J) with another number of dense patches in each image."""
    return (torch.arange(J) < torch.tensor([1, 3, 4, 6])[:, None]).float()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_divergence_by_numpy(temperature: float) -> None:
    """T² Σ p (ln p - ln q), which is nothing between equal answers."""
    teacher, ours = normal(5, Y, seed=1), normal(5, Y, seed=2).requires_grad_()
    p, q = (np.exp(z.detach().double().numpy() / temperature) for z in (teacher, ours))
    p, q = (each / each.sum(1, keepdims=True) for each in (p, q))
    wanted = temperature**2 * (p * (np.log(p) - np.log(q))).sum(1)
    assert soft_divergence(teacher, ours, temperature).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    equal = soft_divergence(ours.detach() + 7, ours, temperature)
    (gradient,) = torch.autograd.grad(equal.sum(), ours)
    assert max(equal.abs().max(), gradient.abs().max()) < 1e-5


def test_logit_distance_by_hand() -> None:
    """(4, 0, 2) and (1, 1, 1) without their means: (2, -2, 0) and 0; 8 of three classes. Offsets are no difference."""
    found = logit_distance(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert found.item() == pytest.approx(8 / 3)
    theirs, ours = normal(5, Y, seed=1).double(), normal(5, Y, seed=2).double()
    assert logit_distance(ours, ours + 7).abs().max() < 1e-10
    limit = 2 * soft_divergence(theirs, ours, 1e4)
    torch.testing.assert_close(logit_distance(theirs, ours), limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("teach", ["logits", "probs"])
def test_soft_labels_are_followed_as_they_were_combined(teach: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithms of small probabilities, unlike logits, are all tail: they are followed by KL, each at its τ."""
    monkeypatch.setattr(losses, "TEMPERATURE", 3.0)
    monkeypatch.setattr(losses, "LOW_TEMPERATURE", 2.0)
    ours, theirs, low = student(), teacher(), 1 - half()
    parts = distillation_loss(ours, theirs, [labels(half())], teach)
    kd, tokens = (
        logit_distance(*pair) if teach == "logits" else soft_divergence(*pair, temperature)
        for *pair, temperature in ((theirs.cls, ours.cls, 3.0), (theirs.patches, ours.patches, 2.0))
    )
    torch.testing.assert_close(parts.kd, kd.mean())
    torch.testing.assert_close(parts.low, (low * tokens).sum() / low.sum())


def test_each_part_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, two patches, two classes, label 0; the first patch is dense.

    The student: [CLS] (3/4, 1/4), patches (1/2, 1/2) and (1/5, 4/5). The ensemble: [CLS] (1/2, 1/2), second patch
    (1/2, 1/2). τ = 1.
    """
    ours = TokenLogits(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[[0.0, 0.0], [0.0, math.log(4)]]]))
    theirs = TokenLogits(torch.zeros(1, 2), torch.tensor([[[9.0, -9.0], [0.0, 0.0]]]))
    one = torch.ones(1)
    asked = Labels(torch.tensor([0]), hard=one, share=one, own=torch.ones(1, 2), dense=torch.tensor([[1.0, 0.0]]))
    monkeypatch.setattr(losses, "TOKEN", 0.5)
    parts = distillation_loss(ours, theirs, [asked], "probs")
    assert parts.high.item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(2))
    assert parts.low.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
    assert parts.kd.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    torch.testing.assert_close(parts.total(), 0.1 * parts.high + parts.low + parts.kd)


def test_what_has_no_weight_is_exactly_zero() -> None:
    ours, zero, zeros = student(), torch.zeros(B), torch.zeros(B, J)
    nothing = labels(share=zero)
    for parts, asked in (
        (["high"], [labels(zeros, hard=zero)]),  # nothing is dense
        (["low"], [labels(torch.ones(B, J))]),  # everything is
        (["kd"], [labels(half(), share=zero, own=torch.ones(B, J))]),
        (["high", "low", "kd"], [nothing, nothing]),
    ):
        found = distillation_loss(ours, teacher(), asked, "probs")
        assert all(getattr(found, part) == 0 for part in parts), parts
        for gradient in torch.autograd.grad(found.total(), [ours.cls, ours.patches]):
            assert torch.isfinite(gradient).all(), parts
            assert len(parts) == 1 or not gradient.any()


def test_mixed_images_have_the_mean_of_both_labels_losses() -> None:
    """λ of the one's and 1 - λ of the other's loss, image by image."""
    ours, theirs, share = student(), teacher(), torch.tensor([0.0, 0.25, 0.5, 1.0])
    one, other = labels(share=share), labels(share=1 - share, targets=torch.tensor([1, 1, 0, 2]))
    found = distillation_loss(ours, theirs, [one, other], "probs")
    high = torch.zeros(())
    for asked in (one, other):
        for cls, patches, target, weight in zip(ours.cls, ours.patches, asked.targets, asked.share, strict=True):
            high = high - weight * (cls.log_softmax(0)[target] + patches.log_softmax(1)[:, target].mean()) / B
    torch.testing.assert_close(found.high, high)
    torch.testing.assert_close(found.kd, soft_divergence(theirs.cls, ours.cls, 1.0).mean())


def test_relabelling_takes_exactly_the_labels_noise_out_of_the_gradient() -> None:
    """A token's gradient is p - y by its pseudo-label, p - q by its soft label, and never both.

    With q = E[y | token], Cov(p - y) = Cov(p - q) + E[Cov(y | token)].
    """
    ours, theirs, asked, dense = student(), teacher(), labels(half()), half()[..., None]
    p, q = (tokens.patches.detach().softmax(-1) for tokens in (ours, theirs))
    parts = distillation_loss(ours, theirs, [asked], "probs")
    high, low = (torch.autograd.grad(part, ours.patches, retain_graph=True)[0] for part in (parts.high, parts.low))
    torch.testing.assert_close(high * dense.sum(), dense * (p - F.one_hot(asked.targets, Y)[:, None]))
    torch.testing.assert_close(low * (1 - dense).sum(), (1 - dense) * (p - q))
