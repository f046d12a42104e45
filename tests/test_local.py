"""Training at the client: losses by hand, FedProx's term, augmentation, one step of optimisation; the average."""

import gc
import math
from pathlib import Path

import pytest
import torch
from tiny import CPU, a_vit, an_upload, same, settings, small
from torch import Tensor, nn

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
from fedmitr_flwr.vit.optim import Stepper, client_stepper
from fedmitr_flwr.vit.tokens import TokenLogits, all_positions, forward_tokens, patchify

pytestmark = pytest.mark.usefixtures("plain_steps")
every = pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])


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


# --- one step: the rate's path, what decays, clipping


def a_parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([values]))


def test_sgd_with_momentum_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 1 at each step, lr 1/2, 3/8 and 1/8, momentum 0.9: velocities 1, 1.9, 2.71.

    AdamW's first step has the length of the learning rate. A gradient (3, 4) over two parameters is cut from length 5.
    """
    parameter = a_parameter(0.0)
    stepper = Stepper([parameter], "sgd", 0.5, total_steps=3)
    for wanted in (-0.5, -1.2125, -1.55125):
        stepper.step(parameter.sum())
        assert parameter.item() == pytest.approx(wanted)
    parameter = a_parameter(1.0, 1.0)
    Stepper([parameter], "adamw", 0.01, total_steps=1).step((parameter * torch.tensor([[5.0, -1e-3]])).sum())
    assert parameter[0].tolist() == pytest.approx([0.99, 1.01], abs=1e-6)
    for limit, moved in ((1.0, [-0.3, -0.4]), (10.0, [-1.5, -2.0])):
        monkeypatch.setattr(optim, "GRAD_CLIP", limit)
        first, second = a_parameter(0.0), a_parameter(0.0)
        Stepper([first, second], "sgd", 0.5, total_steps=1).step(3 * first.sum() + 4 * second.sum())
        assert [first.item(), second.item()] == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_step_of_muon_is_orthogonal_and_has_the_size_of_adamw(scale: float) -> None:
    """Of a gradient U S Vᵀ, of shape (A, B), it is U Vᵀ · 0.2 lr √max(A, B); singular values are near 1 only."""
    gradient = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    matrix, bias = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(3))
    stepper = Stepper([matrix, bias], "muon", 0.01, total_steps=1)
    stepper.step((matrix * gradient).sum() + bias.sum())
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    step = left.T @ -matrix.detach() @ right.T / (0.01 * 0.2 * math.sqrt(6))
    assert ((step.diagonal() > 0.65) & (step.diagonal() < 1.25)).all()
    assert (step - torch.diag(step.diagonal())).abs().max() < 0.05
    assert bias.tolist() == pytest.approx([-0.01] * 3, rel=1e-4)


@every
def test_cosine_is_half_in_the_middle_and_zero_at_the_end(optimizer: str) -> None:
    """It stays at zero, and does not rise again."""
    parameter = a_parameter(1.0)
    stepper = Stepper([parameter], optimizer, 0.5, total_steps=8)
    rates, values = [], []
    for _ in range(11):
        rates.append({rate for each in stepper.schedules for rate in each.get_last_lr()})
        values.append(parameter.item())
        stepper.step(parameter.sum())
    cosine = [0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert [rate for (rate,) in rates] == pytest.approx([*cosine, 0, 0, 0])
    assert values[8:] == [parameter.item()] * 3


@every
def test_biases_norms_positions_and_class_tokens_do_not_decay(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.5)
    vit = a_vit(settings(), 0)
    before = {name: tensor.detach().clone() for name, tensor in vit.named_parameters()}
    Stepper(vit.parameters(), optimizer, 0.1, total_steps=1).step(sum(p.sum() * 0 for p in vit.parameters()))
    spared = vit.no_weight_decay() | {name for name in before if name.endswith("bias") or "norm" in name}
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= spared
    assert {"head.weight", "patch_embed.proj.weight", "blocks.1.mlp.fc1.weight"}.isdisjoint(spared)
    for name, parameter in vit.named_parameters():
        wanted = before[name] if name in spared else 0.95 * before[name]  # 1 - lr · decay
        torch.testing.assert_close(parameter.data, wanted, msg=name)


@every
def test_a_head_may_learn_at_a_rate_of_its_own(optimizer: str) -> None:
    """Every gradient is 1: the first step of SGD and of AdamW is the rate. By the body's the head is of it."""
    for head_lr in (0.5, 0.01):
        vit, before = a_vit(settings(), 0), dict(a_vit(settings(), 0).named_parameters())
        changes = {"optimizer": optimizer, "lr": 0.01, "head-lr": head_lr}
        local = settings(**{f"local.{name}": value for name, value in changes.items()}).local
        stepper = client_stepper(vit, local, total_steps=4)
        stepper.step(sum(parameter.sum() for parameter in vit.parameters()))
        steps = {name: (before[name] - parameter).detach() for name, parameter in vit.named_parameters()}
        names = ["head.bias", "norm.bias", "cls_token"] if optimizer == "muon" else list(steps)
        for name in names + ["head.weight"] * (head_lr != 0.01):
            wanted = torch.full_like(steps[name], head_lr if name.startswith("head.") else 0.01)
            torch.testing.assert_close(steps[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
        falling = 0.5 * (1 + math.cos(math.pi / 4))
        rates = {rate for each in stepper.schedules for rate in each.get_last_lr()}
        assert sorted(rates) == pytest.approx(sorted({0.01 * falling, head_lr * falling}))


@every
def test_a_restored_stepper_goes_on_in_the_same_bits(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.1)
    monkeypatch.setattr(optim, "GRAD_CLIP", 1.0)

    def go(stepper: Stepper, steps: range) -> Stepper:
        for step in steps:
            stepper.step(sum(((parameter - step) ** 2).sum() for parameter in stepper.parameters))
        return stepper

    def started(at: list[nn.Parameter]) -> Stepper:
        return Stepper([nn.Parameter(each.detach().clone()) for each in at], optimizer, 0.1, total_steps=6)

    start = [a_parameter(1.0, -2.0), nn.Parameter(torch.tensor([3.0])), a_parameter(0.5)]
    whole = go(started(start), range(6))
    for done in (0, 1, 3, 6):
        first = go(started(start), range(done))
        state = {name: value.clone() for name, value in first.state().items()}
        assert state["steps"] == done
        second = started(first.parameters)
        second.restore(first.state())
        assert second.schedules[0].get_last_lr() == first.schedules[0].get_last_lr()
        go(second, range(done, 6))
        for ours, theirs in zip(second.parameters, whole.parameters, strict=True):
            assert torch.equal(ours, theirs)
        assert same(first.state(), state)  # the first one's are its own
        assert second.schedules[0].get_last_lr() == whole.schedules[0].get_last_lr()


# --- the average


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
