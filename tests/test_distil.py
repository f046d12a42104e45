"""Distillation: what each batch asks of the student, and that it comes to agree with its teachers."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import Sgd, a_vit, an_upload, same, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.compute import threads
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation import distil as module
from fedmitr_flwr.distillation import losses
from fedmitr_flwr.distillation.distil import Lesson, Plain, count_batches, distil, lessons, student_stepper
from fedmitr_flwr.distillation.losses import Parts
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.ensemble import ensemble as ensemble_module
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.pool import Pool, join
from fedmitr_flwr.vit.tokens import patchify

MODES = ("none", "drop", "tokens")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)


def alone(config: Config, seed: int = 0, teach: str = "logits") -> Ensemble:
    """An ensemble of one teacher."""
    return Ensemble.of([an_upload(config, 0, seed=seed)], config.model, config.ensemble, teach)


def inverted_pool(config: Config, ensemble: Ensemble, count: int = 10, first: int = 0) -> Pool:
    targets = torch.arange(first, first + count) % config.model.num_classes
    images = invert(ensemble, targets, config.inversion, config.model, flip=False, rng=stream(first))
    return relabel(images, config.relabel.mode)


def taught(config: Config) -> tuple[Ensemble, Pool]:
    """One teacher, and ten images by it."""
    ensemble = alone(config)
    return ensemble, inverted_pool(config, ensemble)


def noise_pool(config: Config, count: int) -> Pool:
    """Images of noise, of which the first seven patches are dense."""
    every = torch.arange(16).expand(count, -1)
    dense = every < 7
    patches = patchify(some_images(config, count).clamp(-1, 1), 2)
    targets = torch.arange(count) % config.model.num_classes
    return relabel(Pool(patches, every, dense, dense, targets, torch.zeros(count), 2), config.relabel.mode)


def trained(
    config: Config,
    ensemble: Ensemble,
    pool: Pool,
    seed: int = 7,
    plain: Plain | None = None,
    lr: float | None = None,
) -> VisionTransformer:
    """With `lr`, by plain gradient steps of this rate."""
    student, batches = a_vit(config, seed), count_batches(len(pool), config)
    stepper = Sgd(student, lr, batches) if lr else student_stepper(student, config, batches)
    distil(student, ensemble, pool, config, stepper, stream(0), plain=plain)
    return student


def test_teachers_that_are_asked_ahead_give_the_same_bits() -> None:
    config = settings()
    ensemble, pool = taught(config)
    in_turn = trained(config, ensemble, pool).state_dict()
    with threads(2):
        assert same(trained(config, ensemble, pool).state_dict(), in_turn)


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


def made_lessons(config: Config, ensemble: Ensemble, pool: Pool, plain: Plain | None = None) -> list[Lesson]:
    return list(lessons(ensemble, pool, config, stream(0), plain))


def rows_of(pool: Pool, patches: Tensor, positions: Tensor) -> list[int]:
    """The image that each token (J, E) of one row is of."""
    found = []
    for patch, position in zip(patches, positions.tolist(), strict=True):
        (image,) = [i for i in range(len(pool)) if torch.equal(pool.patches[i, position], patch)]
        found.append(image)
    return found


@pytest.mark.parametrize("keep", [1.0, 0.6])
@pytest.mark.parametrize("mode", MODES)
def test_a_mixtures_labels_belong_to_its_tokens(mode: str, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is one image's, with its place, pseudo-label and density there; shares are those of the tokens."""
    monkeypatch.setattr(module, "KEEP", keep)
    config = settings(**{"relabel.mode": mode})
    ensemble, pool = taught(config)
    made = made_lessons(config, ensemble, pool)
    assert sorted(row for lesson in made for row in lesson.labels[0].targets.tolist()) == list(range(10))
    for lesson in made:
        one, other = lesson.labels
        shown = min(pool.positions.shape[1], round(keep * 16))
        assert lesson.positions.shape == (len(lesson.patches), shown)
        assert torch.equal(one.own + other.own, torch.ones(lesson.positions.shape))
        torch.testing.assert_close(one.share + other.share, torch.ones(len(lesson.patches)))
        assert one.hard.all()
        for row, (patches, positions) in enumerate(zip(lesson.patches, lesson.positions, strict=True)):
            assert one.share[row].item() == pytest.approx(one.own[row].mean().item())
            for token, image in enumerate(rows_of(pool, patches, positions)):
                asked = one if one.own[row, token] else other
                assert asked.targets[row] == pool.targets[image]
                seen_at = pool.positions[image].tolist().index(positions[token])
                assert asked.dense[row, token] == pool.dense[image, seen_at]


def test_images_without_a_dense_patch_have_no_pseudo_label() -> None:
    config = settings(**{"inversion.mode": "pri4"})
    ensemble, pool = taught(config)
    made = made_lessons(config, ensemble, pool)
    hard = sum(int(lesson.labels[0].hard.sum()) for lesson in made)
    assert 2 * hard == len(pool) == sum(len(lesson.patches) for lesson in made)


def test_a_share_is_uniform_and_each_image_has_its_own_choice_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2000)
    config = settings(**{"model.patch-size": 1})  # 64 patches
    every = torch.arange(64).expand(2000, -1)
    dense = torch.ones(2000, 64, dtype=torch.bool)
    pool = Pool(torch.zeros(2000, 64, 1), every, dense, dense, torch.zeros(2000).long(), torch.zeros(2000), 1)
    (lesson,) = made_lessons(config, alone(config), pool)
    share = lesson.labels[0].share
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / 12 + 1 / 6 / 32, abs=0.01)  # of λ, and of 32 draws with it
    assert lesson.positions.shape == (2000, 32)
    assert len({tuple(sorted(row)) for row in lesson.positions.tolist()}) == 2000


@torch.no_grad()
def test_teachers_see_what_the_student_sees() -> None:
    config = settings(**{"data.flip": True})
    with torch.enable_grad():
        ensemble, pool = taught(config)
    for plain in (None, Plain(4.0), Plain(4.0, lambda _ensemble, patches, _positions, _rng: 0.5 * patches)):
        for lesson in made_lessons(config, ensemble, pool, plain):
            assert lesson.positions.shape[1] == (16 if plain else 8)
            wanted = ensemble.scores(lesson.patches, lesson.positions)
            torch.testing.assert_close(tuple(lesson.soft), tuple(wanted))


@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_plain_lessons_show_images_as_they_were_made(inversion: str) -> None:
    """Neither mixed nor thinned, each once per epoch in an order of its own, also in a pool of two."""
    config = settings(**{"inversion.mode": inversion, "relabel.mode": "none", "distill.epochs-per-round": 2})
    ensemble = alone(config)
    pool = join([inverted_pool(config, ensemble, 5), inverted_pool(config, ensemble, 5, first=3)])
    shown = []
    for lesson in made_lessons(config, ensemble, pool, Plain(4.0)):
        for patches, positions in zip(lesson.patches, lesson.positions, strict=True):
            pairs = zip(pool.positions, pool.patches, strict=True)
            (image,) = [
                number
                for number, (own, whole) in enumerate(pairs)
                if torch.equal(positions, own) and torch.equal(patches, whole[own])
            ]
            shown.append(image)
    first, second = shown[: len(pool)], shown[len(pool) :]
    assert sorted(first) == sorted(second) == list(range(len(pool)))
    assert first != second


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
