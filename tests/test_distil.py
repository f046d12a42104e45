"""Distillation: what each batch asks of the student, and that it comes to agree with its teachers."""

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import Sgd, a_vit, an_upload, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation import distil as module
from fedmitr_flwr.distillation import losses
from fedmitr_flwr.distillation.distil import Plain, count_batches, distil, student_stepper
from fedmitr_flwr.distillation.losses import Labels, Parts
from fedmitr_flwr.distillation.pool import Pool, join
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.ensemble import ensemble as ensemble_module
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.result import Inverted
from fedmitr_flwr.vit.optim import Stepper
from fedmitr_flwr.vit.tokens import TokenLogits, forward_tokens, patchify, take

MODES = ("none", "drop", "tokens", "complement")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)


def alone(config: Config, seed: int = 0, teach: str = "logits") -> Ensemble:
    """An ensemble of one teacher."""
    return Ensemble.of([an_upload(config, 0, seed=seed)], config.model, config.ensemble, teach)


def inverted_pool(config: Config, ensemble: Ensemble, count: int = 10, first: int = 0) -> Pool:
    targets = torch.arange(first, first + count) % config.model.num_classes
    images = invert(ensemble, targets, config.inversion, config.model, flip=False, rng=stream(first))
    return Pool.of(images, relabel(images, config.relabel))


def noise_pool(config: Config, count: int) -> Pool:
    """Images of noise, of which the first seven patches are of high density."""
    every = torch.arange(16).expand(count, -1)
    high = every < 7
    images = some_images(config, count).clamp(-1, 1)
    targets = torch.arange(count) % config.model.num_classes
    made = Inverted(images, every, high, high, targets, torch.zeros(count))
    return Pool.of(made, relabel(made, config.relabel))


def a_stepper(student: VisionTransformer, config: Config, pool: Pool) -> Stepper:
    return student_stepper(student, config, count_batches(pool.views, config))


def trained(
    config: Config,
    ensemble: Ensemble,
    pool: Pool,
    seed: int = 7,
    rng_seed: int = 0,
    plain: Plain | None = None,
    lr: float | None = None,
) -> VisionTransformer:
    """With `lr`, by plain gradient steps of this rate."""
    student = a_vit(config, seed)
    stepper = a_stepper(student, config, pool)
    if lr:
        stepper = Sgd(student, lr, count_batches(pool.views, config))
    distil(student, ensemble, pool, config, stepper, stream(rng_seed), plain=plain)
    return student


@pytest.mark.parametrize("mode", ["tokens", "complement"])
def test_teachers_that_are_asked_ahead_give_the_same_bits(mode: str) -> None:
    config = settings(**{"relabel.mode": mode})
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    in_turn = trained(config, ensemble, pool).state_dict()
    with threads(2):
        ahead = trained(config, ensemble, pool).state_dict()
    assert all(torch.equal(ahead[name], tensor) for name, tensor in in_turn.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_batches_are_counted_as_they_run(mode: str, inversion: str) -> None:
    """One epoch here; the learning rate's path over several epochs is counted in test_methods."""
    changes = {"relabel.mode": mode, "inversion.mode": inversion, "distill.epochs-per-round": 3}
    config = settings(**changes)
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    student, seen = a_vit(config, 7), []
    stepper = a_stepper(student, config, pool)
    distil(student, ensemble, pool, config, stepper, stream(0), lambda images, parts: seen.append((images, parts)))
    assert len(seen) == count_batches(pool.views, config)
    assert sum(images for images, _ in seen) == 3 * sum(len(view) for view in pool.views)
    assert stepper.schedules[0].get_last_lr() == [0.0]  # the cosine ends with the last batch
    assert all(isinstance(parts, Parts) for _, parts in seen)
    assert not student.training


def test_batches_over_growing_pools() -> None:
    """Two views of 10 and 5 images per epoch, batches of 4: 3 + 2, then 5 + 3, then 8 + 4, twice each."""

    class View:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

    config = settings(**{"distill.rounds": 3, "distill.epochs-per-round": 2})
    assert count_batches([View(10), View(5)], config) == 2 * (5 + 8 + 12)


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_comes_back_from_its_tensors(mode: str, tmp_path: Path) -> None:
    config = settings(**{"relabel.mode": mode})
    pool = inverted_pool(config, alone(config))
    again = Pool.of_tensors(pool.tensors(), pool.soft)
    assert again.tensors().keys() == pool.tensors().keys()
    pool.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert again.soft == [view.soft for view in pool.views]
    assert len(again) == 10


def test_every_image_is_seen_once_per_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**{"distill.epochs-per-round": 2})
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    sums = pool.images.sum((1, 2, 3)).tolist()
    seen: list[int] = []

    def spy(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> TokenLogits:
        for total in patches.sum((1, 2)).tolist():
            seen.append(min(range(10), key=lambda i: abs(sums[i] - total)))
        return forward_tokens(vit, patches, positions)

    monkeypatch.setattr(module, "forward_tokens", spy)
    trained(config, ensemble, pool, plain=Plain(4.0))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize("teach", ["logits", "probs"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("mode", [*MODES, "plain"])
def test_a_student_that_is_its_teacher_stays(
    mode: str, keep: float, teach: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With soft labels only, the gradient is zero: whatever was mixed up on the way would move the weights."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(module, "KEEP", keep)
    monkeypatch.setattr(ensemble_module, "TEMPERATURE", 1.0)  # softened probabilities are not what the teacher says
    config = settings(**{"relabel.mode": "none" if mode == "plain" else mode, "data.flip": True})
    ensemble = alone(config, 7, teach)
    plain = Plain(4.0) if mode == "plain" else None
    student = trained(config, ensemble, inverted_pool(config, ensemble), seed=7, lr=0.5, plain=plain)
    for (name, ours), theirs in zip(student.named_parameters(), ensemble.teachers[0].parameters(), strict=True):
        torch.testing.assert_close(ours.data, theirs.data, rtol=0, atol=1e-4, msg=name)


def test_another_student_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "HIGH", 0.0)
    config = settings()
    ensemble = alone(config, seed=8)
    student = trained(config, ensemble, inverted_pool(config, ensemble), seed=7, lr=0.5)
    assert (student.head.weight - a_vit(config, 7).head.weight).abs().max() > 1e-3


@pytest.mark.parametrize("plain", [None, Plain(4.0)])
@torch.no_grad()
def test_the_student_comes_to_agree_with_its_teachers(plain: Plain | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(module, "BATCH", 32)
    config = settings(**{"distill.epochs-per-round": 15, "distill.lr": 3e-3})
    ensemble = alone(config, seed=8)
    pool = noise_pool(config, 256)
    fresh = some_images(config, 200, seed=5).clamp(-1, 1)
    wanted = ensemble(fresh).argmax(1)
    before = (a_vit(config, 7)(fresh).argmax(1) == wanted).float().mean()
    with torch.enable_grad():
        student = trained(config, ensemble, pool, plain=plain)
    after = (student(fresh).argmax(1) == wanted).float().mean()
    assert after > before + 0.2


@pytest.mark.parametrize("mode", MODES)
def test_only_the_generator_decides(mode: str) -> None:
    config = settings(**{"relabel.mode": mode})
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    torch.manual_seed(1)
    first = trained(config, ensemble, pool)
    torch.manual_seed(2)
    again, other = trained(config, ensemble, pool), trained(config, ensemble, pool, rng_seed=1)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


class Batch:
    """What one batch showed to the student and asked of it."""

    def __init__(self, patches: Tensor, positions: Tensor) -> None:
        self.patches, self.positions = patches, positions
        self.labels: list[Labels] = []


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    seen: list[Batch] = []
    loss = module.distillation_loss

    def see(vit: VisionTransformer, patches: Tensor, positions: Tensor) -> TokenLogits:
        seen.append(Batch(patches, positions))
        return forward_tokens(vit, patches, positions)

    def asked(student: TokenLogits, labels: list[Labels], *rest: object) -> Parts:
        seen[-1].labels = labels
        return loss(student, labels, *rest)

    monkeypatch.setattr(module, "forward_tokens", see)
    monkeypatch.setattr(module, "distillation_loss", asked)
    return seen


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_each_token_has_a_whole_label(
    batches: list[Batch], mode: str, keep: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over both images of a mixture the weights of a token's labels sum to 1, and so do those of [CLS]."""
    monkeypatch.setattr(module, "KEEP", keep)
    config = settings(**{"relabel.mode": mode})
    ensemble = alone(config)
    trained(config, ensemble, inverted_pool(config, ensemble))
    assert batches
    for batch in batches:
        assert len(batch.labels) == 2
        tokens = sum(each.high + each.low for each in batch.labels)
        shape = batch.positions.shape
        rest = not batch.labels[0].hard.any()  # the complement: no token has a label
        assert tokens.shape == shape
        assert torch.allclose(tokens, torch.zeros(shape) if rest else torch.ones(shape))
        assert torch.allclose(sum(each.share for each in batch.labels), torch.ones(shape[:1]))
        assert torch.allclose(sum(each.hard for each in batch.labels), torch.full(shape[:1], float(not rest)))
        assert mode == "complement" or not rest
        for each in batch.labels:
            assert each.token_scores.shape[:2] == shape
        assert shape[1] <= max(1, round(keep * 16))


@torch.no_grad()
def test_teachers_see_what_the_student_sees(batches: list[Batch]) -> None:
    config = settings(**{"data.flip": True})
    ensemble = alone(config)
    with torch.enable_grad():
        trained(config, ensemble, inverted_pool(config, ensemble))
    for batch in batches:
        assert batch.positions.shape[1] == 8  # half of the patches
        wanted = ensemble.scores(batch.patches, batch.positions)
        for each in batch.labels:
            torch.testing.assert_close(each.scores, wanted.cls)
            torch.testing.assert_close(each.token_scores, wanted.patches)


@pytest.mark.parametrize(("inversion", "mode"), [("sparse", "none"), ("pri4", "none")])
def test_plain_lessons_show_images_as_they_were_made(batches: list[Batch], inversion: str, mode: str) -> None:
    """Neither mixed nor thinned, also in a pool of two."""
    config = settings(**{"inversion.mode": inversion, "relabel.mode": mode})
    ensemble = alone(config)
    pool = join([inverted_pool(config, ensemble, 5), inverted_pool(config, ensemble, 5, first=3)])
    trained(config, ensemble, pool, plain=Plain(4.0))
    (view,) = pool.views
    whole = take(patchify(pool.images, 2)[view.rows], view.given)
    for batch in batches:
        for row in range(len(batch.patches)):
            (look,) = [i for i in range(len(view)) if torch.equal(whole[i], batch.patches[row])]
            assert torch.equal(batch.positions[row], view.given[look])
    assert sum(len(batch.patches) for batch in batches) == len(view)


@torch.no_grad()
def test_a_plain_loss_is_that_of_the_class_token_on_what_is_seen() -> None:
    """By hand: T² KL at T = 4 of whole images that were moved; a student that never steps."""
    config = settings()
    ensemble, student = alone(config), a_vit(config, 7)
    with torch.enable_grad():
        pool = inverted_pool(config, ensemble, 4)  # one batch
    plain = Plain(4.0, lambda _ensemble, patches, _positions, _rng: 0.5 * patches)
    seen: list[Parts] = []
    with torch.enable_grad():
        still = Sgd(student, 0.0, 1)
        distil(student, ensemble, pool, config, still, stream(0), lambda _, parts: seen.append(parts), plain)
    images = 0.5 * pool.images
    p, q = (model(images).div(4).softmax(1) for model in (ensemble, student))
    (parts,) = seen
    torch.testing.assert_close(parts.kd, 16 * (p * (p / q).log()).sum(1).mean())
    assert (parts.high, parts.low) == (0, 0)
    assert parts.total() == parts.kd


def test_a_mixtures_labels_belong_to_its_tokens(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each token shown, the label that weighs comes from the image that the token comes from."""
    monkeypatch.setattr(module, "KEEP", 0.6)
    config = settings()
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    trained(config, ensemble, pool)
    (view,) = pool.views
    whole = patchify(pool.images, 2)
    checked = 0
    for batch in batches:
        one, other = batch.labels
        for row in range(len(batch.patches)):
            for token, position in enumerate(batch.positions[row].tolist()):
                (image,) = [i for i in range(10) if torch.equal(whole[i, position], batch.patches[row, token])]
                asked = one if one.high[row, token] + one.low[row, token] else other
                assert asked.targets[row] == pool.targets[image]
                assert asked.high[row, token] == view.high[image, position]
                checked += 1
    assert checked == 10 * 10


def test_the_complement_teaches_the_class_token_by_the_low_weight(
    batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2: an image of low-density patches has the ensemble's answer as its label, at the weight of `low`."""
    monkeypatch.setattr(module, "BATCH", 10)
    monkeypatch.setattr(module, "KEEP", 1.0)
    config = settings(**{"relabel.mode": "complement"})
    ensemble = alone(config)
    pool = inverted_pool(config, ensemble)
    student, parts = a_vit(config, 7), []
    distil(student, ensemble, pool, config, a_stepper(student, config, pool), stream(0), lambda _, p: parts.append(p))
    assert len(parts) == len(batches) == 2
    for batch, part in zip(batches, parts, strict=True):
        if batch.labels[0].hard.any():
            assert batch.positions.shape[1] == 7
            assert part.high > 0
            assert part.low == 0
            assert part.kd > 0
        else:
            assert batch.positions.shape[1] == 9
            assert part.high == 0
            assert part.low > 0
            assert part.kd == 0
