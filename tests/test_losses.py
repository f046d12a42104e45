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
from fedmitr_flwr.distillation.mix import mix, thin
from fedmitr_flwr.vit.tokens import TokenLogits, all_positions

B, J, Y = 4, 6, 3


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No temperature, and patch tokens that count as the class token does."""
    for name in ("TOKEN", "TEMPERATURE", "LOW_TEMPERATURE"):
        monkeypatch.setattr(losses, name, 1.0)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=stream(seed))


def student(seed: int = 0) -> TokenLogits:
    return TokenLogits(normal(B, Y, seed=seed).requires_grad_(), normal(B, J, Y, seed=seed + 100).requires_grad_())


def labels(high: Tensor | None = None, share: Tensor | None = None, seed: int = 10, **changes: Tensor) -> Labels:
    """Of whole images: `high` patches keep the class, the others have the teacher's label, and so has [CLS]."""
    share = torch.ones(B) if share is None else share
    high = torch.ones(B, J) if high is None else high
    made = Labels(
        targets=torch.tensor([0, 2, 1, 1]),
        hard=share,
        high=share[:, None] * high,
        low=share[:, None] * (1 - high),
        share=share,
        scores=normal(B, Y, seed=seed),
        token_scores=normal(B, J, Y, seed=seed + 1),
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


def test_soft_divergence_of_two_coins() -> None:
    """At T = 1, p = (3/4, 1/4) and q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    found = soft_divergence(torch.tensor([math.log(3), 0.0]), torch.tensor([5.0, 5.0]), 1.0)
    assert found.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_answers_do_not_diverge(temperature: float) -> None:
    logits = normal(2, 5, Y, seed=3).requires_grad_()
    found = soft_divergence(logits.detach() + 7, logits, temperature)
    assert found.shape == (2, 5)
    assert found.abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.abs().max() < 1e-5


def test_the_gradients_scale_does_not_depend_on_temperature() -> None:
    """What T² is for (Hinton et al. 2015): at high T the gradient is (z - z_teacher) / Y for centred logits."""
    teacher, ours = normal(Y, seed=1), normal(Y, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_divergence(teacher, ours, 1000.0), ours)
    difference = ours - teacher
    torch.testing.assert_close(gradient, (difference - difference.mean()) / Y, rtol=1e-2, atol=1e-3)


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
    """Logarithms of small probabilities, unlike logits, are all tail: they are followed by KL."""
    monkeypatch.setattr(losses, "TEMPERATURE", 3.0)
    monkeypatch.setattr(losses, "LOW_TEMPERATURE", 2.0)
    ours, asked = student(), labels(half())
    parts = distillation_loss(ours, [asked], teach)
    low = 1 - half()
    if teach == "logits":
        kd, tokens = logit_distance(asked.scores, ours.cls), logit_distance(asked.token_scores, ours.patches)
    else:
        kd = soft_divergence(asked.scores, ours.cls, 3.0)
        tokens = soft_divergence(asked.token_scores, ours.patches, 2.0)
    torch.testing.assert_close(parts.kd, kd.mean())
    torch.testing.assert_close(parts.low, (low * tokens).sum() / low.sum())


def test_each_part_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, two patches, two classes, label 0; the first patch is dense.

    The student: [CLS] (3/4, 1/4), patches (1/2, 1/2) and (1/5, 4/5). The ensemble: [CLS] (1/2, 1/2), second patch
    (1/2, 1/2). T = τ = 1.
    """
    ours = TokenLogits(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[[0.0, 0.0], [0.0, math.log(4)]]]))
    asked = Labels(
        targets=torch.tensor([0]),
        hard=torch.ones(1),
        high=torch.tensor([[1.0, 0.0]]),
        low=torch.tensor([[0.0, 1.0]]),
        share=torch.ones(1),
        scores=torch.zeros(1, 2),
        token_scores=torch.tensor([[[9.0, -9.0], [0.0, 0.0]]]),
    )
    monkeypatch.setattr(losses, "TOKEN", 0.5)
    parts = distillation_loss(ours, [asked], "probs")
    assert parts.high.item() == pytest.approx(math.log(4 / 3) + 0.5 * math.log(2))
    assert parts.low.item() == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8))
    assert parts.kd.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


def test_each_part_has_its_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asked = student(), labels(half())

    def parts(temperature: float, low: float) -> Parts:
        monkeypatch.setattr(losses, "TEMPERATURE", temperature)
        monkeypatch.setattr(losses, "LOW_TEMPERATURE", low)
        return distillation_loss(ours, [asked], "probs")

    cold, kd, low = parts(1.0, 1.0), parts(3.0, 1.0), parts(1.0, 3.0)
    assert (kd.high, kd.low) == (cold.high, cold.low)
    assert (low.high, low.kd) == (cold.high, cold.kd)
    assert kd.kd != cold.kd
    assert low.low != cold.low
    torch.testing.assert_close(kd.kd, soft_divergence(asked.scores, ours.cls, 3.0).mean())


def test_parts_are_weighted_and_added() -> None:
    """A tenth of the pseudo-labels' part, and the others as they are."""
    parts = Parts(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0))
    assert parts.total().item() == pytest.approx(8.2)


def test_sure_soft_labels_are_pseudo_labels() -> None:
    """`tokens` with one-hot soft labels is `none`, patch by patch, in value and gradient (τ = 1)."""
    high, ours = half(), student()
    asked = labels(high)
    asked = asked._replace(token_scores=certain(asked.targets, (B, J, Y)), scores=certain(asked.targets, (B, Y)))
    softened, plain = (distillation_loss(ours, [each], "probs") for each in (asked, labels()))
    hard = F.cross_entropy(ours.cls, asked.targets)
    dense, rest = high.sum(), (1 - high).sum()
    mixture = (dense * (softened.high - hard) + rest * softened.low) / (dense + rest)
    torch.testing.assert_close(mixture, plain.high - hard)
    ways = [torch.autograd.grad(each, ours.patches, retain_graph=True)[0] for each in (mixture, plain.high)]
    torch.testing.assert_close(*ways)
    torch.testing.assert_close(softened.kd, hard)


@pytest.mark.parametrize("part", ["hard", "high", "low", "share"])
def test_what_has_no_weight_is_exactly_zero(part: str) -> None:
    ours = student()
    nothing = labels(half())._replace(**{part: torch.zeros(B, J) if part in ("high", "low") else torch.zeros(B)})
    if part == "hard":
        nothing = nothing._replace(high=torch.zeros(B, J))
    parts = distillation_loss(ours, [nothing], "probs")
    if part == "high":
        assert torch.equal(parts.high, F.cross_entropy(ours.cls, nothing.targets))
    else:
        assert getattr(parts, {"hard": "high", "low": "low", "share": "kd"}[part]) == 0
    parts.total().backward()
    for gradient in (ours.cls.grad, ours.patches.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    if part == "high":
        assert (ours.patches.grad[half() == 1] == 0).all()
    if part == "low":
        assert (ours.patches.grad[half() == 0] == 0).all()


def test_nothing_at_all_has_weight() -> None:
    ours = student()
    zero, zeros = torch.zeros(B), torch.zeros(B, J)
    nothing = labels()._replace(hard=zero, high=zeros, low=zeros, share=zero)
    total = distillation_loss(ours, [nothing, nothing], "probs").total()
    total.backward()
    assert total == 0
    assert (ours.cls.grad == 0).all()
    assert (ours.patches.grad == 0).all()


def test_a_partner_without_a_share_changes_nothing() -> None:
    ours, asked = student(), labels(half())
    alone = distillation_loss(ours, [asked], "probs")
    partner = labels(1 - half(), torch.zeros(B), seed=20, targets=torch.tensor([1, 1, 0, 2]))
    mixed = distillation_loss(ours, [asked, partner], "probs")
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


def test_mixed_images_have_the_mean_of_both_labels_losses() -> None:
    """λ of the one's and 1 - λ of the other's loss, image by image."""
    ours, share = student(), torch.tensor([0.0, 0.25, 0.5, 1.0])
    one, other = labels(share=share), labels(share=1 - share, seed=20, targets=torch.tensor([1, 1, 0, 2]))
    found = distillation_loss(ours, [one, other], "probs")
    high = kd = 0.0
    for asked, weight in ((one, share), (other, 1 - share)):
        for image in range(B):
            cls, patches, target = ours.cls[image], ours.patches[image], asked.targets[image]
            pseudo = -cls.log_softmax(0)[target] - patches.log_softmax(1)[:, target].mean()
            high += (weight[image] * pseudo).item() / B
            kd += (weight[image] * soft_divergence(asked.scores[image], cls, 1.0)).item() / B
    assert found.high.item() == pytest.approx(high, rel=1e-4)
    assert found.kd.item() == pytest.approx(kd, rel=1e-4)


def test_mixed_tokens_keep_their_content_position_and_share() -> None:
    positions = torch.rand(30, 16, generator=stream(0)).argsort(1)[:, :J]
    patches = normal(30, J, 4, seed=1)
    mixed = mix(patches, positions, stream(2))
    own = (mixed.patches == patches).all(-1)
    for image, partner in enumerate(mixed.partner.tolist()):
        for token in range(J):
            source = image if own[image, token] else partner
            assert torch.equal(mixed.patches[image, token], patches[source, token])
            assert mixed.positions[image, token] == positions[source, token]
        if partner != image:
            assert torch.equal(mixed.token_share[image], own[image].float())
            assert mixed.share[image].item() == pytest.approx(own[image].float().mean().item())
    assert set(mixed.token_share.unique().tolist()) == {0, 1}
    assert len(set(mixed.share.tolist())) > 3  # λ is drawn for each image


def test_a_share_is_uniform() -> None:
    patches = torch.arange(2000.0)[:, None, None].expand(-1, 400, 1)
    share = mix(patches, all_positions(patches), stream(0)).share
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_thinning_keeps_whole_tokens() -> None:
    patches = normal(20, J, 4, seed=1)
    positions = torch.rand(20, 16, generator=stream(0)).argsort(1)[:, :J]
    mixed = mix(patches, positions, stream(2))
    thinned = thin(mixed, 4, stream(3))
    for image in range(20):
        kept = thinned.kept[image]
        assert len(set(kept.tolist())) == 4
        assert torch.equal(thinned.patches[image], mixed.patches[image, kept])
        assert torch.equal(thinned.positions[image], mixed.positions[image, kept])
        assert torch.equal(thinned.token_share[image], mixed.token_share[image, kept])
        assert thinned.share[image] == mixed.token_share[image, kept].mean()
    assert torch.equal(thinned.partner, mixed.partner)
    assert len({tuple(sorted(row)) for row in thinned.kept.tolist()}) > 5  # each image has its own choice


@pytest.mark.parametrize("most", [J, J + 3])
def test_nothing_to_thin(most: int) -> None:
    patches = normal(3, J, 4, seed=1)
    rng = stream(0)
    before = rng.get_state()
    mixed = mix(patches, all_positions(patches), stream(2))
    assert thin(mixed, most, rng) is mixed
    assert torch.equal(rng.get_state(), before)


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
            asked = Labels(
                targets=torch.tensor([y]),
                hard=torch.zeros(1),
                high=torch.full((1, 1), float(not soft)),
                low=torch.full((1, 1), float(soft)),
                share=torch.zeros(1),
                scores=torch.zeros(1, Y),
                token_scores=torch.tensor(q[t]).log()[None, None],
            )
            parts = distillation_loss(ours, [asked], "probs")
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
