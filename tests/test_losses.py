"""The distillation loss by hand, its limits, and the variance that relabelling takes out of its gradient."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation import losses
from fedmitr_flwr.distillation.losses import Labels, Parts, distillation_loss, logit_distance, soft_divergence
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


def certain(targets: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Logits of which softmax is exactly one-hot at the targets."""
    return 1e4 * F.one_hot(targets, Y).float().reshape(B, *[1] * (len(shape) - 2), Y).expand(shape)


def test_soft_divergence_by_numpy() -> None:
    """T² Σ p (ln p - ln q) at T = 2."""
    teacher, ours = normal(5, Y, seed=1), normal(5, Y, seed=2)
    p, q = (np.exp(z.double().numpy() / 2) for z in (teacher, ours))
    p, q = (each / each.sum(1, keepdims=True) for each in (p, q))
    wanted = 4 * (p * (np.log(p) - np.log(q))).sum(1)
    assert soft_divergence(teacher, ours, 2.0).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_answers_do_not_diverge(temperature: float) -> None:
    logits = normal(2, 5, Y, seed=3).requires_grad_()
    found = soft_divergence(logits.detach() + 7, logits, temperature)
    assert found.shape == (2, 5)
    assert found.abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.abs().max() < 1e-5


def test_logit_distance_by_hand() -> None:
    """(4, 0, 2) and (1, 1, 1) without their means: (2, -2, 0) and 0; 8 of three classes. Offsets are no difference."""
    found = logit_distance(torch.tensor([4.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert found.item() == pytest.approx(8 / 3)
    assert logit_distance(normal(Y, seed=1), normal(Y, seed=1) + 7).item() == pytest.approx(0, abs=1e-10)


def test_logit_distance_is_the_limit_of_the_divergence() -> None:
    teacher, ours = normal(5, Y, seed=1).double(), normal(5, Y, seed=2).double()
    torch.testing.assert_close(
        logit_distance(teacher, ours), 2 * soft_divergence(teacher, ours, 1e4), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("teach", ["logits", "probs"])
def test_soft_labels_are_followed_as_they_were_combined(teach: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logarithms of small probabilities, unlike logits, are all tail: they are followed by KL, each at its τ."""
    monkeypatch.setattr(losses, "TEMPERATURE", 3.0)
    monkeypatch.setattr(losses, "LOW_TEMPERATURE", 2.0)
    ours, theirs = student(), teacher()
    parts = distillation_loss(ours, theirs, [labels(half())], teach)
    low = 1 - half()
    if teach == "logits":
        kd, tokens = logit_distance(theirs.cls, ours.cls), logit_distance(theirs.patches, ours.patches)
    else:
        kd = soft_divergence(theirs.cls, ours.cls, 3.0)
        tokens = soft_divergence(theirs.patches, ours.patches, 2.0)
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


def test_parts_are_weighted_and_added() -> None:
    """A tenth of the pseudo-labels' part, and the others as they are."""
    parts = Parts(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0))
    assert parts.total().item() == pytest.approx(8.2)


def test_sure_soft_labels_are_pseudo_labels() -> None:
    """`tokens` with one-hot soft labels is `none`, patch by patch, in value and gradient (τ = 1)."""
    high, ours, asked = half(), student(), labels(half())
    theirs = TokenLogits(certain(asked.targets, (B, Y)), certain(asked.targets, (B, J, Y)))
    softened, plain = (distillation_loss(ours, theirs, [each], "probs") for each in (asked, labels()))
    hard = F.cross_entropy(ours.cls, asked.targets)
    dense, rest = high.sum(), (1 - high).sum()
    mixture = (dense * (softened.high - hard) + rest * softened.low) / (dense + rest)
    torch.testing.assert_close(mixture, plain.high - hard)
    ways = [torch.autograd.grad(each, ours.patches, retain_graph=True)[0] for each in (mixture, plain.high)]
    torch.testing.assert_close(*ways)
    torch.testing.assert_close(softened.kd, hard)


def test_what_has_no_weight_is_exactly_zero() -> None:
    ours, zero, zeros = student(), torch.zeros(B), torch.zeros(B, J)
    cases = {
        "high": labels(zeros, hard=zero),  # nothing is dense
        "low": labels(torch.ones(B, J)),  # everything is
        "kd": labels(half(), share=zero, own=torch.ones(B, J)),
    }
    for part, asked in cases.items():
        parts = distillation_loss(ours, teacher(), [asked], "probs")
        assert getattr(parts, part) == 0, part
        gradients = torch.autograd.grad(parts.total(), [ours.cls, ours.patches], allow_unused=True)
        for gradient in gradients:
            assert gradient is not None, part
            assert torch.isfinite(gradient).all(), part
    nothing = labels(share=zero)
    total = distillation_loss(ours, teacher(), [nothing, nothing], "probs").total()
    assert total == 0
    for gradient in torch.autograd.grad(total, [ours.cls, ours.patches]):
        assert (gradient == 0).all()


def test_a_token_follows_its_pseudo_label_or_the_ensemble() -> None:
    """Where patches are dense, other answers of the ensemble change no gradient of the tokens, and the reverse."""
    ours, dense = student(), half()

    def gradient(theirs: TokenLogits, targets: Tensor) -> Tensor:
        total = distillation_loss(ours, theirs, [labels(dense, targets=targets)], "logits").total()
        (found,) = torch.autograd.grad(total, ours.patches)
        return found

    plain = gradient(teacher(), torch.tensor([0, 2, 1, 1]))
    by_others = gradient(teacher(20), torch.tensor([0, 2, 1, 1]))
    by_targets = gradient(teacher(), torch.tensor([1, 0, 2, 0]))
    assert torch.equal(plain[dense == 1], by_others[dense == 1])
    assert torch.equal(plain[dense == 0], by_targets[dense == 0])
    assert not torch.isclose(plain, by_others)[dense == 0].all(-1).any()
    assert not torch.isclose(plain, by_targets)[dense == 1].all(-1).any()


def test_a_partner_without_a_share_changes_nothing() -> None:
    ours, asked = student(), labels(half())
    alone = distillation_loss(ours, teacher(), [asked], "probs")
    partner = labels(1 - half(), torch.zeros(B), targets=torch.tensor([1, 1, 0, 2]))
    mixed = distillation_loss(ours, teacher(), [asked, partner], "probs")
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_mixed_images_have_the_mean_of_both_labels_losses() -> None:
    """λ of the one's and 1 - λ of the other's loss, image by image."""
    ours, theirs, share = student(), teacher(), torch.tensor([0.0, 0.25, 0.5, 1.0])
    one, other = labels(share=share), labels(share=1 - share, targets=torch.tensor([1, 1, 0, 2]))
    found = distillation_loss(ours, theirs, [one, other], "probs")
    high = 0.0
    for asked, weight in ((one, share), (other, 1 - share)):
        for image in range(B):
            cls, patches, target = ours.cls[image], ours.patches[image], asked.targets[image]
            pseudo = -cls.log_softmax(0)[target] - patches.log_softmax(1)[:, target].mean()
            high += (weight[image] * pseudo).item() / B
    assert found.high.item() == pytest.approx(high, rel=1e-4)
    torch.testing.assert_close(found.kd, soft_divergence(theirs.cls, ours.cls, 1.0).mean())


def test_relabelling_takes_exactly_the_labels_noise_out_of_the_gradient() -> None:
    """Cov(p - y) = Cov(p - q) + E[Cov(y | token)] where q = E[y | token].

    Tokens t = 0..3 with probability r, labels y ~ q_t, student's answer p_t. By enumeration of all (t, y): the
    gradients are the loss's own, by pseudo-label and by soft label; the identity is checked by numpy.
    """
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.ones(4))
    q = rng.dirichlet(np.ones(Y), size=4)  # (4, Y)
    logits = rng.normal(size=(4, Y))
    cells = list(product(range(4), range(Y)))
    weight = np.array([r[t] * q[t, y] for t, y in cells])

    def gradients(soft: bool) -> np.ndarray:
        """(cells, Y): of the loss of one patch token with respect to its logits."""
        rows = []
        for t, y in cells:
            ours = TokenLogits(torch.zeros(1, Y), torch.tensor(logits[t])[None, None].requires_grad_())
            theirs = TokenLogits(torch.zeros(1, Y), torch.tensor(q[t]).log()[None, None])
            dense = torch.full((1, 1), float(not soft))
            asked = Labels(torch.tensor([y]), torch.zeros(1), torch.zeros(1), torch.ones(1, 1), dense)
            parts = distillation_loss(ours, theirs, [asked], "probs")
            (gradient,) = torch.autograd.grad(parts.low if soft else parts.high, ours.patches)
            rows.append(gradient.flatten().numpy())
        return np.stack(rows)

    def covariance(values: np.ndarray) -> np.ndarray:
        centred = values - weight @ values
        return centred.T @ (weight[:, None] * centred)

    pseudo, soft = gradients(soft=False), gradients(soft=True)
    noise = sum(r[t] * (np.diag(q[t]) - np.outer(q[t], q[t])) for t in range(4))
    np.testing.assert_allclose(weight @ pseudo, weight @ soft, atol=1e-9)
    np.testing.assert_allclose(covariance(pseudo), covariance(soft) + noise, atol=1e-9)
    removed = np.trace(covariance(pseudo)) - np.trace(covariance(soft))
    assert removed == pytest.approx(r @ (1 - (q**2).sum(1)))
    assert removed > 0.1
