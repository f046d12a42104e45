"""The ensemble: answers as on paper, weights per class, importance, many teachers streamed or stacked, routing."""

import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import a_vit, an_ensemble, an_upload, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble import ensemble as module
from fedmitr_flwr.ensemble import teachers as teachers_module
from fedmitr_flwr.ensemble.ensemble import Ensemble, combine_answers, teacher_weights
from fedmitr_flwr.ensemble.routing import Routing, everyone, route
from fedmitr_flwr.inversion.objective import cross_entropy
from fedmitr_flwr.vit.tokens import all_positions, forward_cls, forward_tokens, patchify, take

COMBINES = ("logits", "probs")
TARGETS = torch.tensor([4, 0, 7, 4])


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


def test_weights_are_per_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher 1 alone answers for class 0, teacher 2 alone for class 1: p = (3/4, 4/5), not normalised."""
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(4)]], requires_grad=True)
    for combine, wanted in (("logits", (3, 4)), ("probs", (3 / 4, 4 / 5))):
        found = combine_answers(logits, torch.eye(2), combine)
        assert found.tolist() == pytest.approx([math.log(each) for each in wanted])
        (gradient,) = torch.autograd.grad(found.log_softmax(-1)[0], logits)
        assert torch.isfinite(gradient).all()  # also where a weight is 0
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("combine", COMBINES)
def test_the_order_of_the_teachers_does_not_matter(combine: str) -> None:
    logits = 10 * torch.randn(4, 100, 3, generator=stream(0), dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()[:, None].expand(-1, 3)
    forwards = combine_answers(logits, weights, combine)
    torch.testing.assert_close(combine_answers(logits.flip(0), weights.flip(0), combine), forwards)


@pytest.mark.parametrize(("combine", "weights"), [("logits", "uniform"), ("probs", "size"), ("logits", "counts")])
@torch.no_grad()
def test_one_teacher_is_the_model(combine: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    config = settings(**{"ensemble.combine": combine, "ensemble.weights": weights, "upload.extras": "counts"})
    upload = an_upload(config, 0, 10, (10, *[0] * 9))
    ensemble, vit = Ensemble.of([upload], config.model, config.ensemble), a_vit(config, 0)
    images = some_images(config, 5)
    torch.testing.assert_close(ensemble(images).softmax(-1), vit(images).softmax(-1))
    ids = torch.tensor([[3, 1]]).expand(5, -1)
    some = take(patchify(images, 2), ids)
    for ours, alone in zip(ensemble.scores(some, ids), forward_tokens(vit, some, ids), strict=True):
        torch.testing.assert_close(ours.softmax(-1), alone.softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize(("combine", "teach"), [("logits", "probs"), ("probs", "logits")])
def test_it_decides_by_one_rule_and_teaches_by_another(combine: str, teach: str) -> None:
    config = settings(**{"ensemble.combine": combine})
    ensemble = Ensemble.of([an_upload(config, k, 10 + 5 * k) for k in range(2)], config.model, config.ensemble, teach)
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())
    assert not any(module.training for module in ensemble.teachers.residents.modules())
    images = some_images(config, 4)
    patches = patchify(images, 2)
    answers = ensemble.answers(images, batch_size=3)
    torch.testing.assert_close(answers, torch.stack([a_vit(config, client)(images) for client in range(2)]))
    assert torch.equal(ensemble.probabilities(images), ensemble.answers(images).softmax(-1))
    decided, taught = (combine_answers(answers, ensemble.weights, how) for how in (combine, teach))
    torch.testing.assert_close(ensemble(images), decided)
    torch.testing.assert_close(ensemble.scores(patches, all_positions(patches)).cls, taught)


def test_teacher_weights_by_hand() -> None:
    """With counts, class 1 belongs to the second client alone, and nobody has class 2: there the sizes count."""
    uploads = [an_upload(settings(), 0, 2, (2, 0, 0)), an_upload(settings(), 1, 30, (6, 24, 0))]
    for how, wanted in (
        ("uniform", [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),
        ("size", [[0.0625, 0.0625, 0.0625], [0.9375, 0.9375, 0.9375]]),
        ("counts", [[0.25, 0.0, 0.0625], [0.75, 1.0, 0.9375]]),
    ):
        torch.testing.assert_close(teacher_weights(uploads, 3, how), torch.tensor(wanted))


@torch.no_grad()
def test_a_confident_teacher_decides_what_is_important() -> None:
    config = settings()
    sure, unsure = a_vit(config, 0), a_vit(config, 1)
    for vit, bias in ((sure, 200.0), (unsure, -200.0)):
        vit.head.weight.zero_()
        vit.head.bias.zero_()[4] = bias
    patches = patchify(some_images(config, 3), 2)
    asked = patches, all_positions(patches), torch.tensor([4, 4, 4])
    found = Ensemble([unsure, sure], torch.full((2, 10), 0.5), "logits").importance(*asked)
    assert torch.equal(found, forward_cls(sure, *asked[:2])[1])
    assert not torch.allclose(found, forward_cls(unsure, *asked[:2])[1], atol=1e-3)
    nobody = Ensemble([unsure], torch.ones(1, 10), "logits").importance(*asked)
    assert torch.isfinite(nobody).all()  # where no teacher has confidence


@torch.no_grad()
def test_importance_is_the_mean_attention_by_weight_times_confidence() -> None:
    """Softened at 3 also where `combine` is logits, whose scores are not."""
    ensemble = an_ensemble(settings(**{"ensemble.combine": "logits"}), 3)
    ensemble.weights = torch.rand(3, 10, generator=stream(1))
    ids, targets = torch.rand(4, 16, generator=stream(0)).argsort(1)[:, :5], torch.tensor([0, 3, 3, 9])
    patches = take(patchify(some_images(settings(), 4), 2), ids)
    total, wanted = torch.zeros(4, 1), torch.zeros(4, 5)
    for weights, teacher in zip(ensemble.weights, ensemble.teachers, strict=True):
        logits, attention = forward_cls(teacher, patches, ids)
        confidence = (weights * (logits / 3).softmax(-1)).gather(1, targets[:, None])
        total, wanted = total + confidence, wanted + confidence * attention
    torch.testing.assert_close(ensemble.importance(patches, ids, targets), wanted / total)


# --- many teachers: streamed or stacked, they are one ensemble; routing asks those that know the class


def many(combine: str = "probs", chunk: int = 16, teachers: int = 3) -> Ensemble:
    """Of no more networks than `chunk` in memory; it teaches as it decides."""
    config = settings(**{"ensemble.combine": combine})
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(teachers)]
    with pytest.MonkeyPatch.context() as patch:
        network = sum(tensor.nbytes for tensor in uploads[0].weights.values())
        patch.setattr(teachers_module, "ROOM", chunk * network)
        return Ensemble.of(uploads, config.model, config.ensemble, combine)


def some_patches() -> tuple[Tensor, Tensor]:
    """(4, 6, E) of random positions."""
    patches = patchify(some_images(settings(), 4), 2)
    ids = torch.rand(4, 16, generator=stream(3)).argsort(1)[:, :6]
    return take(patches, ids), ids


def target_loss(ensemble: Ensemble, patches: Tensor, ids: Tensor, targets: Tensor, routing: Routing) -> list[Tensor]:
    """Cross-entropy (B,), with a penalty on the patches themselves, and its gradient by the patches."""

    def loss(scores: Tensor, patches: Tensor) -> Tensor:
        return cross_entropy(scores, targets) + patches.square().mean((1, 2))

    return list(ensemble.slope(loss, patches, ids, routing))


def answers(ensemble: Ensemble, device: str = "cpu") -> list[Tensor]:
    """Everything that is asked of an ensemble."""
    patches, ids = (each.to(device) for each in some_patches())
    targets = TARGETS.to(device)
    with torch.no_grad():
        images = ensemble(some_images(settings(), 4).to(device))
        scores = ensemble.scores(patches, ids)
    loss = target_loss(ensemble, patches, ids, targets, everyone(ensemble.weights))
    return [images, *scores, *loss, ensemble.importance(patches, ids, targets)]


@pytest.mark.parametrize(("combine", "chunk"), [("probs", 1), ("logits", 2), ("probs", 3)])
def test_teachers_streamed_from_their_uploads_are_the_ensemble(
    combine: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, as on a GPU, stacked ones."""
    ensemble, in_turn = many(combine, chunk), answers(many(combine))
    assert len(ensemble.teachers) == 3
    assert len(ensemble.teachers.residents) == chunk  # networks in memory
    assert bool(ensemble.teachers.streamed) == (chunk < 3)
    torch.testing.assert_close(answers(ensemble), in_turn, rtol=1e-4, atol=1e-6)
    for name in ("FEW", "GRAPHS"):  # all are in memory, but no room for more than one graph
        monkeypatch.setattr(teachers_module, name, 1)
    torch.testing.assert_close(answers(many(combine)), in_turn, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    monkeypatch.setattr("fedmitr_flwr.ensemble.ensemble._stacks", lambda _: True)
    stacked = many(combine)
    assert not stacked.by_many
    torch.testing.assert_close(answers(stacked), in_turn, rtol=1e-4, atol=1e-6)


def test_what_a_gradient_keeps_is_counted_as_torch_does() -> None:
    """Of so small a model to within 40 %: `keep_graphs` does not count what is as large as its 6 patches."""
    patches, ids = some_patches()
    leaf, ensemble, seen = patches.requires_grad_(), many(chunk=17, teachers=17), dict[int, int]()

    def count(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or tensor is leaf:
            seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward_tokens(ensemble.teachers[0], leaf, ids)
    with pytest.MonkeyPatch.context() as patch:
        for share, wanted in ((0.6, False), (1.7, True)):
            patch.setattr(teachers_module, "GRAPHS", share * 17 * sum(seen.values()))
            assert ensemble.teachers.keep_graphs(patches) == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stacked", [True, False])
def test_a_gpu_answers_as_the_cpu_does(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.ensemble.ensemble._stacks", lambda tensor: stacked and tensor.is_cuda)
    on_gpu = [found.cpu() for found in answers(many().to("cuda"), "cuda")]
    torch.testing.assert_close(on_gpu, answers(many()), rtol=1e-3, atol=1e-5)


def test_the_loss_and_its_gradient_are_autograds() -> None:
    ensemble, (patches, ids) = many("probs"), some_patches()
    leaf = patches.clone().requires_grad_()
    logits = torch.stack([forward_tokens(ensemble.teachers[k], leaf, ids).cls for k in range(3)])
    mixture = ((logits / 3).softmax(-1) * ensemble.weights[:, None]).sum(0)
    wanted = leaf.square().mean((1, 2)) - mixture.gather(1, TARGETS[:, None]).squeeze(1).log()
    wanted.sum().backward()
    found = target_loss(ensemble, patches, ids, TARGETS, everyone(ensemble.weights))
    torch.testing.assert_close(found, [wanted, leaf.grad])
    assert not patches.requires_grad


def test_routing_by_hand() -> None:
    """Of class 0: 0.6 is the best, 0.3 is half of it, 0.1 a sixth. At a threshold of 1/2 teachers 0 and 1 are asked."""
    weights_KY = torch.tensor([[0.6, 0.0, 0.1], [0.3, 0.5, 0.1], [0.1, 0.5, 0.8]])
    routing = route(weights_KY, torch.tensor([0, 1, 2]), 0.5)
    assert {k: rows.tolist() for k, rows in routing.rows.items()} == {0: [0], 1: [0, 1], 2: [1, 2]}
    assert routing.share == pytest.approx(5 / 9)
    wanted = torch.tensor([[2 / 3, 0, 1 / 2], [1 / 3, 1, 1 / 2], [0, 0, 0]])
    torch.testing.assert_close(routing.weights[:, 0], wanted)
    alone = route(weights_KY, torch.tensor([0, 2]), 1.0)
    assert {k: rows.tolist() for k, rows in alone.rows.items()} == {0: [0], 2: [1]}
    assert alone.weights[:, 0].tolist() == [[1] * 3, [0] * 3, [0] * 3]  # class 1: teacher 0 has no say, yet is alone
    torch.testing.assert_close(alone.weights.sum(0), torch.ones(2, 3))


def test_a_threshold_of_0_is_the_full_ensemble() -> None:
    """And one below every teacher's share asks everyone too, if by another way."""
    ensemble, given = many("probs"), (*some_patches(), TARGETS)
    full = target_loss(ensemble, *given, everyone(ensemble.weights))
    nothing, barely = (route(ensemble.weights, TARGETS, least) for least in (0.0, 1e-6))
    assert nothing.share == barely.share == 1
    assert all(map(torch.equal, target_loss(ensemble, *given, nothing), full))
    torch.testing.assert_close(target_loss(ensemble, *given, barely), full)


@pytest.mark.parametrize(("combine", "chunk"), [("logits", 16), ("probs", 2)])
def test_a_routed_image_sees_the_ensemble_of_its_teachers_alone(combine: str, chunk: int) -> None:
    ensemble, pair = many(combine, chunk), many(combine, teachers=2)
    ensemble.weights = torch.tensor([[0.6, *[1 / 3] * 9], [0.3, *[1 / 3] * 9], [0.1, *[1 / 3] * 9]])
    pair.weights = torch.tensor([[2 / 3, *[0.5] * 9], [1 / 3, *[0.5] * 9]])
    patches, ids = some_patches()
    targets = torch.tensor([0, 1, 0, 2])  # class 0: without teacher 2
    routing = route(ensemble.weights, targets, 0.5)
    found = *target_loss(ensemble, patches, ids, targets, routing), ensemble.importance(patches, ids, targets, routing)
    for rows, alone in (([0, 2], pair), ([1, 3], ensemble)):
        given = patches[rows], ids[rows], targets[rows]
        wanted = *target_loss(alone, *given, everyone(alone.weights)), alone.importance(*given)
        torch.testing.assert_close([each[rows] for each in found], list(wanted), rtol=1e-4, atol=1e-6)


def test_a_teacher_that_nobody_asks_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, targets, read = many("probs", chunk=1), torch.tensor([0, 2, 3, 5]), list[int]()
    ensemble.weights = torch.eye(3)[:, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]

    def resident(teachers: Any, k: int) -> VisionTransformer:
        read.append(k)
        return teachers.residents[0]

    monkeypatch.setattr(type(ensemble.teachers), "__getitem__", resident)
    target_loss(ensemble, *some_patches(), targets, route(ensemble.weights, targets, 0.5))
    assert read == [0, 2, 0, 2]  # for the answers, then for the gradient
