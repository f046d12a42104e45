"""Training at the client: losses by hand, FedProx's term, augmentation; the average."""

import gc
import math
from pathlib import Path

import pytest
import torch
from tiny import a_vit, an_upload, same, settings, small
from torch import Tensor

from fedmitr_flwr.client.losses import label_loss
from fedmitr_flwr.client.outliers import evenness_loss, outliers, skew
from fedmitr_flwr.client.train import shift_and_flip, train_local
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config, ModelConfig
from fedmitr_flwr.data.images import DataSet, prepare
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.uploads.stored import StoredWeights
from fedmitr_flwr.uploads.upload import Upload, load, save
from fedmitr_flwr.vit import optim
from fedmitr_flwr.vit.build import Weights
from fedmitr_flwr.vit.tokens import TokenLogits, all_positions, forward_tokens, patchify

CPU = torch.device("cpu")


def for_bars(**changes: object) -> Config:
    """The settings for the `tiny` data set of three classes."""
    return settings(**{"model.num-classes": 3} | changes)


def trained(tiny: DataSet, config: Config, rng: torch.Generator, mu: float = 0.0) -> tuple[Weights, float]:
    vit = a_vit(config, 0)
    loss = train_local(vit, tiny.train, config, rng, CPU, mu)
    return vit.state_dict(), loss


def test_label_loss_by_hand() -> None:
    """Softmax gives (3/4, 1/4) for [CLS]; (1/2, 1/2) and (1/5, 4/5) for two patches, which weigh half; the label: 0."""
    logits = TokenLogits(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[[0.0, 0.0], [0.0, math.log(4)]]]))
    whole = math.log(4 / 3) + 0.5 * (math.log(2) + math.log(5)) / 2
    assert label_loss(logits, torch.tensor([0])).item() == pytest.approx(whole)


@pytest.fixture
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps by the gradients alone."""
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(optim, "GRAD_CLIP", math.inf)


@pytest.mark.usefixtures("_plain")
def test_the_first_step_does_not_feel_the_proximal_term_and_the_second_does(tiny: DataSet) -> None:
    """At the start w = w⁰. After one step of SGD the gradient gains μ (w - w⁰); the second of two has half the rate."""
    plain = {"local.optimizer": "sgd", "local.lr": 0.01, "local.augment": False, "local.batch-size": 60}
    start = a_vit(for_bars(), 0).state_dict()
    once, with_mu = (trained(tiny, for_bars(**plain), stream(1), mu)[0] for mu in (0.0, 7.0))
    assert same(once, with_mu)
    twice, prox = (trained(tiny, for_bars(**plain, **{"local.epochs": 2}), stream(1), mu)[0] for mu in (0.0, 7.0))
    for name, tensor in prox.items():
        torch.testing.assert_close(tensor, twice[name] - 0.005 * 7.0 * (once[name] - start[name]), rtol=1e-5, atol=1e-6)


def test_evenness_and_skew_by_hand() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4): ½ ln 2 + ½ ln ⅔ = 0.143841; even answers cost nothing.

    H = ln 2 of two classes as frequent; (1/4, 3/4) has 0.562335. 11 and 9 of 20 are a sample of even classes.
    """
    uneven, even = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    patches = torch.stack([uneven, even], 1)  # of two patches one is even
    assert evenness_loss(TokenLogits(even, even[:, None])).item() == pytest.approx(0, abs=1e-7)
    assert evenness_loss(TokenLogits(uneven, patches)).item() == pytest.approx(0.143841 * 1.25, abs=1e-6)
    skews = {(0, 0, 3, 0): 1, (1, 1, 1, 1): 0, (0, 2, 0, 2): 0.5, (0, 1, 0, 3): 1 - 0.562335 / math.log(4)}
    for counts, wanted in (skews | {(11, 9): 0, (14, 6): 0.118709}).items():
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        assert skew(labels, len(counts)) == pytest.approx(wanted, abs=1e-6)


def test_images_of_no_class_are_own_ones_turned_or_shuffled(tiny: DataSet) -> None:
    pixels = prepare(tiny.train.pixels[:5], small())
    own = patchify(pixels[:3], 2)
    turned = [patchify(pixels[:3].rot90(quarter, (2, 3)), 2) for quarter in (1, 3)]
    shuffled = 0
    for seed in range(60):
        found = outliers(pixels, 2, stream(seed))
        assert found.shape == own.shape  # of five images, three
        if not any(torch.equal(found, each) for each in turned):
            shuffled += 1
            assert torch.equal(*(patches.flatten(1).sort(1).values for patches in (found, own)))
            assert not torch.equal(found, own)
    assert 15 < shuffled < 45  # 30 expected


def test_who_learned_on_images_of_no_class_names_none_on_them(tiny: DataSet) -> None:
    """Who has all classes alike trains as without them."""
    plain, other = (trained(tiny, for_bars(**{"local.outliers": weight}), stream(0))[0] for weight in (0.0, 1.0))
    assert same(plain, other)
    losses, two = [], tiny.train.subset((tiny.train.labels < 2).nonzero()[:, 0])
    for weight in (0.0, 2.0):
        config = for_bars(**{"local.outliers": weight, "local.epochs": 20})
        vit = a_vit(config, 0)
        train_local(vit, two, config, stream(0), CPU)
        pixels = prepare(two.pixels, config.model)
        strange = torch.cat([outliers(pixels, config.model.patch_size, stream(seed)) for seed in range(6)])
        with torch.no_grad():
            losses.append(evenness_loss(forward_tokens(vit, strange, all_positions(strange))).item())
    assert losses[1] < 0.5 * losses[0]


def test_the_loss_falls_on_separable_classes(tiny: DataSet) -> None:
    """The one returned is the last epoch's mean over images; 60 of them in batches of 16, 16, 16 and 12."""
    still = for_bars(**{"local.lr": 1e-30, "local.augment": False})
    vit = a_vit(still, 0)
    with torch.no_grad():
        patches = patchify(prepare(tiny.train.pixels, small()), 2)
        logits = forward_tokens(vit, patches, all_positions(patches))
    own, rows = tiny.train.labels, torch.arange(60)
    first = -logits.cls.log_softmax(1)[rows, own].mean().item()
    first -= 0.5 * logits.patches.log_softmax(2)[rows, :, own].mean().item()
    assert train_local(vit, tiny.train, still, stream(0), CPU) == pytest.approx(first, rel=1e-5)
    config = for_bars(**{"local.epochs": 12, "local.lr": 3e-3, "local.augment": False})
    assert train_local(vit, tiny.train, config, stream(0), CPU) < 0.4 * first
    assert not vit.training
    with torch.no_grad():
        right = vit(prepare(tiny.test.pixels, small())).argmax(1) == tiny.test.labels
    assert right.float().mean() >= 0.9


def test_every_epoch_sees_every_image_once(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it neither shifts nor mirrors unless it may."""
    seen: list[int] = []
    asked: list[bool] = []

    def spy(pixels: Tensor, model: ModelConfig) -> Tensor:
        seen.extend(int(image.long().sum()) for image in pixels)
        return prepare(pixels, model)

    def spy_of_shifts(images: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
        asked.append(flip)
        return shift_and_flip(images, flip=flip, rng=rng)

    monkeypatch.setattr("fedmitr_flwr.client.train.prepare", spy)
    monkeypatch.setattr("fedmitr_flwr.client.train.shift_and_flip", spy_of_shifts)
    for augment, flip in ((True, False), (True, True), (False, True)):
        trained(tiny, for_bars(**{"local.augment": augment, "data.flip": flip, "local.batch-size": 60}), stream(0))
    assert asked == [False, True]
    seen.clear()
    trained(tiny, for_bars(**{"local.epochs": 2}), stream(0))
    wanted = sorted(int(image.long().sum()) for image in tiny.train.pixels)
    assert sorted(seen[:60]) == sorted(seen[60:]) == wanted
    assert seen[:60] != seen[60:]


def by_hand(image: Tensor, dy: int, dx: int, mirror: bool) -> Tensor:
    """Shifted content with repeated edges, pixel by pixel, then mirrored."""
    last = image.shape[1] - 1
    moved = torch.empty_like(image)
    for row in range(last + 1):
        for column in range(last + 1):
            moved[:, row, column] = image[:, min(max(row + dy, 0), last), min(max(column + dx, 0), last)]
    return moved.flip(-1) if mirror else moved


@pytest.mark.parametrize(("size", "reach", "flip"), [(8, 1, True), (16, 2, False), (5, 1, False)])
def test_shift_and_flip_by_hand(size: int, reach: int, flip: bool) -> None:
    """Each image by itself, in all ways."""
    images = torch.randn(2, 2, size, size, generator=stream(0)).repeat(200, 1, 1, 1)
    result = shift_and_flip(images, flip=flip, rng=stream(1))
    found = torch.zeros(400)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            for mirror in {False, flip}:
                moved = torch.stack([by_hand(image, dy, dx, mirror) for image in images[:2]]).repeat(200, 1, 1, 1)
                alike = (result == moved).flatten(1).all(1)
                assert alike.any(), (dy, dx, mirror)
                found += alike
    assert (found == 1).all()


def test_the_average_is_weighted_by_images() -> None:
    """Of equal uploads it is the upload, bit for bit, also where the shares are no binary fractions."""
    weights = torch.tensor([[0.0, 8.0], [4.0, -4.0]])
    two = [Upload(client, {"w": weights[client]}, 1 + 2 * client, 0.5, "") for client in (0, 1)]
    assert average(two)["w"].tolist() == [3.0, -1.0]
    for clients in (1, 2, 3, 7):
        alike = [an_upload(settings(), client, 10 + 3 * client, seed=5) for client in range(clients)]
        mean = average(alike)
        assert list(mean) == list(alike[0].weights)
        assert same(mean, alike[0].weights)


def of_rows(client: int) -> Upload:
    """Weights of shapes that no other tensor has."""
    rng = stream(client)
    weights = {name: torch.randn(rows, 61, generator=rng) for name, rows in (("a", 53), ("b", 59))}
    return Upload(client, weights, 10 + client, 0.5, "c" * 12)


def like(tensor: Tensor) -> int:
    """How many tensors of this shape there are in the process."""
    return sum(type(each) is Tensor and each.shape == tensor.shape for each in gc.get_objects())


def test_the_average_of_files_needs_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of each file is read once; two are alive at a time beside the sum and its newest part."""
    wanted = average([of_rows(client) for client in range(6)])
    for client in range(6):
        save(of_rows(client), tmp_path / str(client))
    uploads = [load(tmp_path / str(client)) for client in range(6)]
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
    assert same(average(uploads), wanted)
    assert sorted(read) == sorted((str(client), name) for client in range(6) for name in ("a", "b"))
    assert max(alive) <= before + 4
