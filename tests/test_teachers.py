"""Many teachers: streamed, stacked or one by one, they are one ensemble; routing asks those that know the class."""

import pytest
import torch
from tiny import an_upload, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.ensemble import teachers as module
from fedmitr_flwr.ensemble.ensemble import Ensemble, combine_answers
from fedmitr_flwr.ensemble.routing import Routing, everyone, route
from fedmitr_flwr.inversion.objective import cross_entropy
from fedmitr_flwr.vit.tokens import forward_tokens, patchify, take

COMBINES = ("logits", "probs")
TARGETS = torch.tensor([4, 0, 7, 4])


def an_ensemble(combine: str = "probs", chunk: int = 16, teachers: int = 5) -> Ensemble:
    """Of no more networks than `chunk` in memory; it teaches as it decides."""
    config = settings(**{"ensemble.combine": combine})
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(teachers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
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


@pytest.mark.parametrize(("combine", "chunk"), [("probs", 1), ("logits", 2), ("probs", 4), ("logits", 5), ("probs", 6)])
def test_teachers_streamed_from_their_uploads_are_the_ensemble(combine: str, chunk: int) -> None:
    ensemble = an_ensemble(combine, chunk)
    assert len(ensemble.teachers) == 5
    assert len(ensemble.teachers.residents) == min(chunk, 5)  # networks in memory
    assert bool(ensemble.teachers.streamed) == (chunk < 5)
    for found, wanted in zip(answers(ensemble), answers(an_ensemble(combine)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINES)
def test_stacked_teachers_are_the_ensemble(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    in_turn = answers(an_ensemble(combine))
    monkeypatch.setattr("fedmitr_flwr.ensemble.ensemble._stacks", lambda _: True)
    stacked = an_ensemble(combine)
    assert not stacked.by_many
    for found, wanted in zip(answers(stacked), in_turn, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stacked", [True, False])
def test_a_gpu_answers_as_the_cpu_does(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.ensemble.ensemble._stacks", lambda tensor: stacked and tensor.is_cuda)
    on_gpu = answers(an_ensemble().to("cuda"), "cuda")
    for found, wanted in zip(on_gpu, answers(an_ensemble()), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-5)


def test_the_loss_and_its_gradient_are_autograds() -> None:
    ensemble = an_ensemble("probs")
    patches, ids = some_patches()
    leaf = patches.clone().requires_grad_()
    logits = torch.stack(
        [forward_tokens(teacher, leaf, ids).cls for teacher in map(ensemble.teachers.__getitem__, range(5))]
    )
    mixture = ((logits / 3).softmax(-1) * ensemble.weights[:, None]).sum(0)
    wanted = leaf.square().mean((1, 2)) - mixture.gather(1, TARGETS[:, None]).squeeze(1).log()
    wanted.sum().backward()
    loss, gradient = target_loss(ensemble, patches, ids, TARGETS, everyone(ensemble.weights))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, leaf.grad)
    assert not patches.requires_grad


WEIGHTS = torch.tensor([[0.6, 0.0, 0.1], [0.3, 0.5, 0.1], [0.1, 0.5, 0.8]])


def test_routing_by_hand() -> None:
    """Of class 0: 0.6 is the best, 0.3 is half of it, 0.1 a sixth. At a threshold of 1/2 teachers 0 and 1 are asked."""
    routing = route(WEIGHTS, torch.tensor([0, 1, 2]), 0.5)
    assert {k: rows.tolist() for k, rows in routing.rows.items()} == {0: [0], 1: [0, 1], 2: [1, 2]}
    assert routing.share == pytest.approx(5 / 9)
    assert routing.weights[:, 0].tolist() == [
        pytest.approx([2 / 3, 0, 1 / 2]),
        pytest.approx([1 / 3, 1, 1 / 2]),
        [0, 0, 0],
    ]
    alone = route(WEIGHTS, torch.tensor([0, 2]), 1.0)
    assert {k: rows.tolist() for k, rows in alone.rows.items()} == {0: [0], 2: [1]}
    assert alone.weights[:, 0].tolist() == [[1] * 3, [0] * 3, [0] * 3]  # class 1: teacher 0 has no say, yet is alone
    torch.testing.assert_close(alone.weights.sum(0), torch.ones(2, 3))


def test_a_threshold_of_0_is_the_full_ensemble() -> None:
    ensemble = an_ensemble("probs")
    patches, ids = some_patches()
    routing = route(ensemble.weights, TARGETS, 0.0)
    assert routing.share == 1
    full = target_loss(ensemble, patches, ids, TARGETS, everyone(ensemble.weights))
    for found, wanted in zip(target_loss(ensemble, patches, ids, TARGETS, routing), full, strict=True):
        assert torch.equal(found, wanted)
    # and a threshold below every teacher's share asks everyone too, if by another way
    barely = route(ensemble.weights, TARGETS, 1e-6)
    assert barely.share == 1
    for found, wanted in zip(target_loss(ensemble, patches, ids, TARGETS, barely), full, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("chunk", [16, 2])
def test_a_routed_image_sees_the_ensemble_of_its_teachers_alone(combine: str, chunk: int) -> None:
    ensemble = an_ensemble(combine, chunk, teachers=3)
    ensemble.weights = torch.tensor([[0.6, *[1 / 3] * 9], [0.3, *[1 / 3] * 9], [0.1, *[1 / 3] * 9]])
    patches, ids = some_patches()
    targets = torch.tensor([0, 1, 0, 2])  # class 0: without teacher 2
    loss, gradient = target_loss(ensemble, patches, ids, targets, route(ensemble.weights, targets, 0.5))
    importance = ensemble.importance(patches, ids, targets, route(ensemble.weights, targets, 0.5))
    pair = an_ensemble(combine, teachers=2)
    pair.weights = torch.tensor([[2 / 3, *[0.5] * 9], [1 / 3, *[0.5] * 9]])
    for rows, alone in (([0, 2], pair), ([1, 3], ensemble)):
        wanted = target_loss(alone, patches[rows], ids[rows], targets[rows], everyone(alone.weights))
        torch.testing.assert_close(loss[rows], wanted[0])
        torch.testing.assert_close(gradient[rows], wanted[1], rtol=1e-4, atol=1e-7)
        wanted_importance = alone.importance(patches[rows], ids[rows], targets[rows])
        torch.testing.assert_close(importance[rows], wanted_importance)


def test_a_teacher_that_nobody_asks_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = an_ensemble("probs", chunk=1, teachers=3)
    ensemble.weights = torch.eye(3)[:, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]]
    read: list[int] = []
    monkeypatch.setattr(
        type(ensemble.teachers), "__getitem__", lambda teachers, k: read.append(k) or teachers.residents[0]
    )
    targets = torch.tensor([0, 2, 3, 5])
    target_loss(ensemble, *some_patches(), targets, route(ensemble.weights, targets, 0.5))
    assert read == [0, 2, 0, 2]  # for the answers, then for the gradient


def test_combining_takes_weights_for_each_image() -> None:
    logits = torch.randn(2, 3, 5, generator=stream(0))
    own = torch.rand(2, 3, 5, generator=stream(1))
    for combine in COMBINES:
        each = [combine_answers(logits[:, i : i + 1], own[:, i], combine) for i in range(3)]
        torch.testing.assert_close(combine_answers(logits, own, combine), torch.cat(each))
