"""Training at the client: losses by hand, FedProx's term, augmentation, equal bits, a loss that falls; the average."""

import copy
import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import a_vit, an_upload, settings
from torch import Tensor

from fedmitr_flwr.config import Config
from fedmitr_flwr.data.images import DataSet, prepare
from fedmitr_flwr.rng import stream
from fedmitr_flwr.training.average import average
from fedmitr_flwr.training.local import label_loss, proximal, shift_and_flip, train_local
from fedmitr_flwr.training.stored import StoredWeights
from fedmitr_flwr.training.upload import Upload, Weights, load, save
from fedmitr_flwr.vit.tokens import TokenLogits

CPU = torch.device("cpu")


def for_bars(**changes: object) -> Config:
    """The settings for the `tiny` data set of three classes."""
    return settings(**{"model.num-classes": 3} | changes)


def trained(tiny: DataSet, config: Config, rng: torch.Generator, mu: float = 0.0) -> tuple[Weights, float]:
    vit = a_vit(config, 0)
    loss = train_local(vit, tiny.train, config, rng, CPU, mu)
    return vit.state_dict(), loss


def flat(weights: Weights) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


def test_label_loss_by_hand() -> None:
    """Softmax gives (3/4, 1/4) for [CLS]; (1/2, 1/2) and (1/5, 4/5) for two patches; the label is 0.

    CE = ln 4/3; patches (ln 2 + ln 5) / 2; with smoothing 0.2: -(0.9 ln 3/4 + 0.1 ln 1/4), and so on.
    """
    logits = TokenLogits(
        torch.tensor([[math.log(3), 0.0]]), torch.tensor([[[0.0, 0.0], [0.0, math.log(4)]]])
    )  # (1, 2) and (1, 2, 2)
    labels = torch.tensor([0])
    assert label_loss(logits, labels, 0.0, 0.0).item() == pytest.approx(math.log(4 / 3))
    whole = math.log(4 / 3) + 0.5 * (math.log(2) + math.log(5)) / 2
    assert label_loss(logits, labels, 0.0, 0.5).item() == pytest.approx(whole)
    smooth = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4))
    assert label_loss(logits, labels, 0.2, 0.0).item() == pytest.approx(smooth)
    smooth_tokens = (math.log(2) - (0.9 * math.log(1 / 5) + 0.1 * math.log(4 / 5))) / 2
    assert label_loss(logits, labels, 0.2, 0.5).item() == pytest.approx(smooth + 0.5 * smooth_tokens)


def test_label_loss_is_the_mean_over_images() -> None:
    cls, patches = torch.randn(4, 3, generator=stream(0)), torch.randn(4, 5, 3, generator=stream(1))
    labels = torch.tensor([0, 2, 1, 1])
    each = [
        label_loss(TokenLogits(cls[i : i + 1], patches[i : i + 1]), labels[i : i + 1], 0.1, 0.5).item()
        for i in range(4)
    ]
    assert label_loss(TokenLogits(cls, patches), labels, 0.1, 0.5).item() == pytest.approx(np.mean(each), rel=1e-5)


def test_the_proximal_term_is_half_mu_times_the_squared_distance() -> None:
    config = settings()
    vit, start = a_vit(config, 0), [weight.detach().clone() for weight in a_vit(config, 1).parameters()]
    distance = [
        np.square(w.detach().double().numpy() - s.double().numpy()).sum()
        for w, s in zip(vit.parameters(), start, strict=True)
    ]
    term = proximal(vit, start, mu=0.3)
    assert term.item() == pytest.approx(0.15 * sum(distance), rel=1e-5)
    term.backward()
    for weight, old in zip(vit.parameters(), start, strict=True):
        torch.testing.assert_close(weight.grad, 0.3 * (weight.detach() - old))


def test_the_first_step_does_not_feel_the_proximal_term_and_the_second_does(tiny: DataSet) -> None:
    """At the start w = w⁰. After one step of SGD the gradient gains μ (w - w⁰)."""
    plain = {"local.optimizer": "sgd", "local.lr": 0.01, "local.schedule": "constant", "local.grad-clip": 0.0}
    plain |= {"local.weight-decay": 0.0, "local.augment": False, "local.batch-size": 60}
    start = flat(a_vit(for_bars(), 0).state_dict())
    once, with_mu = (trained(tiny, for_bars(**plain), stream(1), mu)[0] for mu in (0.0, 7.0))
    assert torch.equal(flat(once), flat(with_mu))
    twice, prox = (trained(tiny, for_bars(**plain, **{"local.epochs": 2}), stream(1), mu)[0] for mu in (0.0, 7.0))
    torch.testing.assert_close(flat(prox), flat(twice) - 0.01 * 7.0 * (flat(once) - start), rtol=1e-5, atol=1e-6)


def test_a_huge_mu_holds_the_weights(tiny: DataSet) -> None:
    slow = {"local.optimizer": "sgd", "local.lr": 3e-3, "local.epochs": 10, "local.schedule": "constant"}
    config = for_bars(**slow, **{"local.weight-decay": 0.0, "local.grad-clip": 0.0})
    start = flat(a_vit(config, 0).state_dict())
    free, held = (flat(trained(tiny, config, stream(1), mu)[0]) - start for mu in (0.0, 100.0))
    assert 0 < held.norm() < 0.2 * free.norm()


def test_equal_generators_give_equal_bits_and_others_do_not(tiny: DataSet) -> None:
    config = for_bars(**{"data.flip": True})
    torch.manual_seed(1)
    first, loss = trained(tiny, config, stream(0))
    torch.manual_seed(2)
    again, same = trained(tiny, config, stream(0))
    other, _ = trained(tiny, config, stream(1))
    assert loss == same
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(other))


@pytest.mark.parametrize("augment", [True, False])
def test_without_augmentation_only_the_order_is_random(tiny: DataSet, augment: bool) -> None:
    # One batch: its order is the order of a sum, but for augmentation.
    whole = {"local.batch-size": 60, "local.augment": augment, "local.optimizer": "sgd"}
    first, second = (flat(trained(tiny, for_bars(**whole), stream(seed))[0]) for seed in (0, 1))
    assert torch.allclose(first, second, atol=1e-6) is not augment


def test_the_loss_falls_on_separable_classes(tiny: DataSet) -> None:
    config = for_bars(**{"local.epochs": 12, "local.lr": 3e-3, "local.augment": False})
    vit = a_vit(config, 0)
    _, first = trained(tiny, for_bars(), stream(0))
    last = train_local(vit, tiny.train, config, stream(0), CPU)
    assert last < 0.4 * first
    assert not vit.training
    with torch.no_grad():
        right = vit(prepare(tiny.test.pixels, 8)).argmax(1) == tiny.test.labels
    assert right.float().mean() >= 0.9


def test_the_loss_returned_is_the_last_epochs_mean_over_images(tiny: DataSet) -> None:
    """Without any step (lr ≈ 0) it is the loss of the given weights; 60 images in batches of 16, 16, 16 and 12."""
    config = for_bars(**{"local.lr": 1e-30, "local.augment": False, "local.weight-decay": 0.0, "local.token-loss": 0.0})
    vit = a_vit(config, 0)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(vit(prepare(tiny.train.pixels, 8)), tiny.train.labels).item()
    assert train_local(vit, tiny.train, config, stream(0), CPU) == pytest.approx(wanted, rel=1e-5)


def test_every_epoch_sees_every_image_once(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(pixels: Tensor, img_size: int) -> Tensor:
        seen.extend(int(image.long().sum()) for image in pixels)
        return prepare(pixels, img_size)

    monkeypatch.setattr("fedmitr_flwr.training.local.prepare", spy)
    trained(tiny, for_bars(**{"local.epochs": 2}), stream(0))
    wanted = sorted(int(image.long().sum()) for image in tiny.train.pixels)
    assert sorted(seen[:60]) == sorted(seen[60:]) == wanted
    assert seen[:60] != seen[60:]


def by_hand(image: Tensor, dy: int, dx: int, mirror: bool) -> Tensor:
    """Shifted content with repeated edges, pixel by pixel, then mirrored."""
    _, height, width = image.shape
    moved = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            moved[:, row, column] = image[:, min(max(row + dy, 0), height - 1), min(max(column + dx, 0), width - 1)]
    return moved.flip(-1) if mirror else moved


@pytest.mark.parametrize(("size", "reach", "flip"), [(8, 1, True), (8, 1, False), (16, 2, False), (5, 1, False)])
def test_shift_and_flip_by_hand(size: int, reach: int, flip: bool) -> None:
    images = torch.randn(400, 2, size, size, generator=stream(0))
    images = images[:1].expand_as(images).clone()  # one image, so that each way is made by hand once
    result = shift_and_flip(images, flip=flip, rng=stream(1))
    found = torch.zeros(400)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            for mirror in {False, flip}:
                same = (result == by_hand(images[0], dy, dx, mirror)).flatten(1).all(1)
                assert same.any(), (dy, dx, mirror)
                found += same
    assert (found == 1).all()


def test_shift_and_flip_moves_each_image_by_itself() -> None:
    images = torch.randn(6, 1, 8, 8, generator=stream(0))
    result = shift_and_flip(images, flip=True, rng=stream(1))
    for image, moved in zip(images, result, strict=True):
        ways = [(dy, dx, mirror) for dy in (-1, 0, 1) for dx in (-1, 0, 1) for mirror in (False, True)]
        assert sum(torch.equal(by_hand(image, *way), moved) for way in ways) == 1


def test_train_local_never_mirrors_unless_it_may(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def spy(images: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
        asked.append(flip)
        return shift_and_flip(images, flip=flip, rng=rng)

    monkeypatch.setattr("fedmitr_flwr.training.local.shift_and_flip", spy)
    for flip in (False, True):
        trained(tiny, for_bars(**{"data.flip": flip, "local.batch-size": 60}), stream(0))
    assert asked == [False, True]


def upload(client: int, num_examples: int, *values: float) -> Upload:
    return Upload(client, {"w": torch.tensor(values)}, num_examples, 0.5, "c" * 12)


def test_the_average_is_weighted_by_images() -> None:
    mean = average([upload(0, 1, 0.0, 8.0), upload(1, 3, 4.0, -4.0)])
    assert mean["w"].tolist() == [3.0, -1.0]
    assert mean["w"].dtype == torch.float32


@pytest.mark.parametrize("clients", [1, 2, 3, 7])
def test_the_average_of_equal_uploads_is_the_upload(clients: int) -> None:
    """Bit for bit, also for numbers of images of which the shares are no binary fractions."""
    config = settings()
    same = [an_upload(config, client, 10 + 3 * client, seed=5) for client in range(clients)]
    mean = average(same)
    assert list(mean) == list(same[0].weights)
    assert all(torch.equal(mean[name], tensor) for name, tensor in same[0].weights.items())


def test_the_order_of_arrival_does_not_matter_once_sorted() -> None:
    config = settings()
    uploads = [an_upload(config, client, 10 + 3 * client) for client in range(5)]
    arrived = [uploads[i] for i in (3, 0, 4, 2, 1)]
    ours, theirs = average(uploads), average(sorted(arrived, key=lambda each: each.client))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_average_leaves_the_uploads_alone() -> None:
    uploads = [an_upload(settings(), client) for client in range(2)]
    before = copy.deepcopy([each.weights for each in uploads])
    for tensor in average(uploads).values():
        tensor.zero_()
    for each, weights in zip(uploads, before, strict=True):
        assert all(torch.equal(each.weights[name], weights[name]) for name in weights)


def of_rows(client: int) -> Upload:
    """Weights of shapes that no other tensor has."""
    rng = stream(client)
    weights = {name: torch.randn(rows, 61, generator=rng) for name, rows in (("a", 53), ("b", 59))}
    return Upload(client, weights, 10 + client, 0.5, "c" * 12)


def like(tensor: Tensor) -> int:
    """How many tensors of this shape there are in the process."""
    return sum(type(each) is Tensor and each.shape == tensor.shape for each in gc.get_objects())


@pytest.mark.parametrize("clients", [2, 12])
def test_the_average_of_files_needs_the_memory_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    """Each tensor of each file is read once; two are alive at a time beside the sum and its newest part."""
    wanted = average([of_rows(client) for client in range(clients)])
    for client in range(clients):
        save(of_rows(client), tmp_path / str(client))
    uploads = [load(tmp_path / str(client)) for client in range(clients)]
    read: list[tuple[str, str]] = []
    alive: list[int] = []
    get = StoredWeights.__getitem__

    def spy(weights: StoredWeights, name: str) -> Tensor:
        read.append((weights.path.name, name))
        tensor = get(weights, name)
        alive.append(like(tensor))
        return tensor

    monkeypatch.setattr(StoredWeights, "__getitem__", spy)
    before = like(wanted["a"])
    mean = average(uploads)
    assert all(torch.equal(mean[name], tensor) for name, tensor in wanted.items())
    assert sorted(read) == sorted((str(client), name) for client in range(clients) for name in ("a", "b"))
    assert max(alive) <= before + 4
