"""The ensemble: answers combined as on paper, one teacher is itself, weights per class, importance by confidence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import a_vit, an_ensemble, an_upload, settings, some_images

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.ensemble import ensemble as module
from fedmitr_flwr.ensemble.ensemble import Ensemble, combine_answers, teacher_weights
from fedmitr_flwr.vit.tokens import all_positions, forward_cls, forward_tokens, patchify, take

COMBINES = ("logits", "probs")


@pytest.fixture
def unsoftened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers' own probabilities."""
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)


def test_answers_are_combined_as_on_paper() -> None:
    """Two teachers, two classes. At temperature 3 the odds are cube roots.

    z₁ = (ln 27, 0) -> p₁ = (3/4, 1/4); z₂ = (0, ln 64) -> p₂ = (1/5, 4/5); w = 1/4 and 3/4 for both classes.
        logits: (ln 27 / 4, 3 ln 64 / 4)
        probs:  ln (3/16 + 3/20) = ln 27/80, ln (1/16 + 12/20) = ln 53/80
    """
    logits = torch.tensor([[math.log(27), 0.0], [0.0, math.log(64)]])
    weights = torch.tensor([[0.25, 0.25], [0.75, 0.75]])
    on_paper = {
        "logits": [math.log(27) / 4, 3 * math.log(64) / 4],
        "probs": [math.log(27 / 80), math.log(53 / 80)],
    }
    for combine, wanted in on_paper.items():
        assert combine_answers(logits, weights, combine).tolist() == pytest.approx(wanted), combine
        many = combine_answers(logits[:, None, None].expand(2, 3, 4, 2), weights, combine)  # (K, B, M, Y)
        assert many.shape == (3, 4, 2)
        assert many[2, 3].tolist() == pytest.approx(wanted), combine


def test_the_surer_of_two_certain_teachers_is_believed_although_it_has_fewer_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0.999 of 50.3 % of the images against 0.9999 of 49.7 %: by weights at 1, by what is said at 3."""
    logits = torch.tensor([[0.9990, 0.0010], [0.0001, 0.9999]]).logit()
    weights = torch.tensor([[0.503, 0.503], [0.497, 0.497]])
    assert combine_answers(logits, weights, "probs").argmax() == 1
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    assert combine_answers(logits, weights, "probs").argmax() == 0


@pytest.mark.usefixtures("unsoftened")
def test_weights_are_per_class() -> None:
    """Teacher 1 alone answers for class 0, teacher 2 alone for class 1: p = (3/4, 4/5), not normalised."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(4)]])
    weights = torch.eye(2)
    assert combine_answers(logits, weights, "logits").tolist() == pytest.approx([math.log(3), math.log(4)])
    assert combine_answers(logits, weights, "probs").tolist() == pytest.approx([math.log(3 / 4), math.log(4 / 5)])


@pytest.mark.parametrize("combine", COMBINES)
def test_a_weight_of_zero_leaves_finite_gradients(combine: str) -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    combine_answers(logits, torch.eye(2), combine).log_softmax(-1)[0].backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=2, max_size=4),
    st.sampled_from(COMBINES),
)
def test_the_order_of_the_teachers_does_not_matter(rows: list[list[float]], combine: str) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    weights = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)[:, None].expand(-1, 3)
    weights = weights / weights.sum(0)
    forwards = combine_answers(logits, weights, combine)
    torch.testing.assert_close(combine_answers(logits.flip(0), weights.flip(0), combine), forwards)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("weights", ["uniform", "size", "counts"])
@pytest.mark.usefixtures("unsoftened")
@torch.no_grad()
def test_one_teacher_is_the_model(combine: str, weights: str) -> None:
    config = settings(**{"ensemble.combine": combine, "ensemble.weights": weights, "upload.extras": "counts"})
    upload = an_upload(config, 0, 10, (10, *[0] * 9))
    ensemble = Ensemble.of([upload], config.model, config.ensemble)
    vit = a_vit(config, 0)
    images = some_images(config, 5)
    torch.testing.assert_close(ensemble(images).softmax(-1), vit(images).softmax(-1))
    patches, ids = patchify(images, 2), torch.tensor([[3, 1]]).expand(5, -1)
    given, alone = ensemble.scores(take(patches, ids), ids), forward_tokens(vit, take(patches, ids), ids)
    torch.testing.assert_close(given.cls.softmax(-1), alone.cls.softmax(-1))
    torch.testing.assert_close(given.patches.softmax(-1), alone.patches.softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("teach", COMBINES)
def test_it_decides_by_one_rule_and_teaches_by_another(combine: str, teach: str) -> None:
    config = settings(**{"ensemble.combine": combine})
    ensemble = Ensemble.of([an_upload(config, k, 10 + 5 * k) for k in range(2)], config.model, config.ensemble, teach)
    images = some_images(config, 4)
    patches, ids = patchify(images, 2), torch.arange(16).expand(4, -1)
    answers = ensemble.answers(images)
    decided, taught = (combine_answers(answers, ensemble.weights, how) for how in (combine, teach))
    torch.testing.assert_close(ensemble(images), decided)
    torch.testing.assert_close(ensemble.scores(patches, ids).cls, taught)


@torch.no_grad()
def test_a_silent_teacher_is_not_asked_for_what_its_patches_say() -> None:
    config = settings(**{"ensemble.combine": "probs"})
    uploads = [an_upload(config, 0, 10), an_upload(config, 1, 30), an_upload(config, 2, 40)]
    images = some_images(config, 4)
    patches, ids = patchify(images, 2), torch.arange(16).expand(4, -1)
    three = Ensemble.of(uploads, config.model, config.ensemble, "probs", silent=1)
    torch.testing.assert_close(three.token_weights[:, 0], torch.tensor([0.25, 0.75, 0]))
    given = three.scores(patches, ids)
    two = Ensemble.of(uploads[:2], config.model, config.ensemble, "probs").scores(patches, ids)
    torch.testing.assert_close(given.patches, two.patches)
    everybody = Ensemble.of(uploads, config.model, config.ensemble, "probs").scores(patches, ids)
    torch.testing.assert_close(given.cls, everybody.cls)
    assert not torch.allclose(given.patches, everybody.patches)


def test_teachers_are_frozen_and_in_eval_mode() -> None:
    ensemble = an_ensemble(settings())
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert not any(module.training for module in ensemble.teachers.residents.modules())
    assert (ensemble.patch, ensemble.grid) == (2, 4)


def weights_of(config: Config, how: str, sizes: list[int], counts: list[tuple[int, ...]] | None = None) -> list[object]:
    table = counts or [None] * len(sizes)
    uploads = [an_upload(config, k, size, row) for k, (size, row) in enumerate(zip(sizes, table, strict=True))]
    return teacher_weights(uploads, 3, how).tolist()


def test_teacher_weights_by_hand() -> None:
    config = settings()
    thirds = [pytest.approx([1 / 3] * 3)] * 3
    assert weights_of(config, "uniform", [1, 2, 5]) == thirds
    assert weights_of(config, "size", [10, 30]) == [[0.25] * 3, [0.75] * 3]
    # class 1 belongs to the second client alone, and nobody has class 2: there the sizes count
    counts = [(2, 0, 0), (6, 24, 0)]
    assert weights_of(config, "counts", [2, 30], counts) == [
        pytest.approx([0.25, 0.0, 0.0625]),
        pytest.approx([0.75, 1.0, 0.9375]),
    ]


def test_a_confident_teacher_decides_what_is_important() -> None:
    config = settings()
    sure, unsure = a_vit(config, 0), a_vit(config, 1)
    with torch.no_grad():
        for vit, bias in ((sure, 200.0), (unsure, -200.0)):
            vit.head.weight.zero_()
            vit.head.bias.zero_()
            vit.head.bias[4] = bias
    ensemble = Ensemble([unsure, sure], torch.full((2, 10), 0.5), "logits")
    patches = patchify(some_images(config, 3), 2)
    positions = all_positions(patches)
    found = ensemble.importance(patches, positions, torch.tensor([4, 4, 4]))
    assert torch.equal(found, forward_cls(sure, patches, positions)[1])
    assert not torch.allclose(found, forward_cls(unsure, patches, positions)[1], atol=1e-3)


@torch.no_grad()
def test_importance_is_the_mean_attention_by_weight_times_confidence() -> None:
    """Softened at 3 also where `combine` is logits, whose scores are not."""
    config = settings(**{"ensemble.combine": "logits"})
    ensemble = an_ensemble(config, 3)
    ensemble.weights = torch.rand(3, 10, generator=stream(1))
    patches = patchify(some_images(config, 4), 2)
    ids = torch.rand(4, 16, generator=stream(0)).argsort(1)[:, :5]
    targets = torch.tensor([0, 3, 3, 9])
    found = ensemble.importance(take(patches, ids), ids, targets)
    for image, target in enumerate(targets.tolist()):
        total, wanted = 0.0, torch.zeros(5)
        for weights, teacher in zip(ensemble.weights, ensemble.teachers, strict=True):
            one = slice(image, image + 1)
            logits, attention = forward_cls(teacher, take(patches, ids)[one], ids[one])
            confidence = (weights[target] * (logits / 3).softmax(-1)[0, target]).item()
            total, wanted = total + confidence, wanted + confidence * attention[0]
        torch.testing.assert_close(found[image], wanted / total)


@torch.no_grad()
def test_importance_is_finite_where_no_teacher_has_confidence() -> None:
    config = settings()
    ensemble = an_ensemble(config, 2)
    for teacher in ensemble.teachers:
        teacher.head.bias[4] = -1e4
    patches = patchify(some_images(config, 2), 2)
    found = ensemble.importance(patches, all_positions(patches), torch.tensor([4, 4]))
    assert torch.isfinite(found).all()


@torch.no_grad()
def test_answers_are_the_teachers_own_logits() -> None:
    config = settings()
    images = some_images(config, 5)
    ensemble = Ensemble.of([an_upload(config, client) for client in range(2)], config.model, config.ensemble)
    wanted = torch.stack([a_vit(config, client)(images) for client in range(2)])
    torch.testing.assert_close(ensemble.answers(images, batch_size=2), wanted)
    assert torch.equal(ensemble.probabilities(images), ensemble.answers(images).softmax(-1))
