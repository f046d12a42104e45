"""Distillation: what relabelling shows, what each batch asks of the student, and that it comes to agree."""

from functools import cache
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import Sgd, a_vit, an_ensemble, an_upload, same, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.distillation import distil as module
from fedmitr_flwr.distillation import losses
from fedmitr_flwr.distillation.distil import Plain, Question, count_batches, distil, questions, student_stepper
from fedmitr_flwr.distillation.losses import Parts
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.ensemble import ensemble as ensemble_module
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.pool import Pool, join
from fedmitr_flwr.vit.tokens import TokenLogits, all_positions, forward_tokens, patchify

MODES = ("none", "drop", "tokens")
TWO_TEACHERS = an_ensemble(settings())
EVERY = torch.arange(16).expand(3, -1)
HALVED = Plain(4.0, lambda _ensemble, patches, _positions, _rng: 0.5 * patches)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)


@cache
def alone(seed: int = 0, teach: str = "logits", patch: int = 2) -> Ensemble:
    """An ensemble of one teacher; read only."""
    config = settings(**{"model.patch-size": patch})
    return Ensemble.of([an_upload(config, 0, seed=seed)], config.model, config.ensemble, teach)


def inverted_pool(config: Config, ensemble: Ensemble, count: int = 10, first: int = 0) -> Pool:
    targets = torch.arange(first, first + count) % config.model.num_classes
    images = invert(ensemble, targets, config.inversion, config.model, flip=False, rng=stream(first))
    return relabel(images, config.relabel.mode)


def trained(
    config: Config, ensemble: Ensemble, pool: Pool, seed: int = 7, plain: Plain | None = None, lr: float = 0.0
) -> VisionTransformer:
    """With `lr`, by plain gradient steps of this rate."""
    student, batches = a_vit(config, seed), count_batches(len(pool), config)
    stepper = Sgd(student, lr, batches) if lr else student_stepper(student, config, batches)
    distil(student, ensemble, pool, config, stepper, stream(0), plain=plain)
    return student


@pytest.mark.parametrize(("mode", "keep"), [("none", 0.5), ("drop", 1.0), ("tokens", 0.5), ("plain", 1.0)])
def test_a_student_that_is_its_teacher_stays(mode: str, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With soft labels only, the gradient is zero: whatever was mixed up on the way would move the weights."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(module, "KEEP", keep)
    monkeypatch.setattr(ensemble_module, "TEMPERATURE", 1.0)  # softened probabilities are not what the teacher says
    config = settings(**{"relabel.mode": "none" if mode == "plain" else mode, "data.flip": True})
    for teach in ("logits", "probs"):
        ensemble = alone(7, teach)
        plain = Plain(4.0) if mode == "plain" else None
        student = trained(config, ensemble, inverted_pool(config, ensemble), plain=plain, lr=0.5)
        ours, theirs = student.state_dict(), ensemble.teachers[0].state_dict()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plain", [None, Plain(4.0)])
def test_the_student_comes_to_agree_with_its_teachers(plain: Plain | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images of noise, of which the first seven patches are dense."""
    monkeypatch.setattr(losses, "HIGH", 0.0)
    monkeypatch.setattr(module, "BATCH", 32)
    config = settings(**{"distill.epochs-per-round": 10, "distill.lr": 3e-3})
    ensemble, patches = alone(8), patchify(some_images(config, 128).clamp(-1, 1), 2)
    every = all_positions(patches)
    pool = Pool(patches, every, every < 7, every < 7, torch.arange(128) % 10, torch.zeros(128), 2)
    student = trained(config, ensemble, pool, plain=plain)
    fresh = some_images(config, 200, seed=5).clamp(-1, 1)
    wanted, before, after = (vit(fresh).argmax(1) for vit in (ensemble, a_vit(config, 7), student))
    assert (after == wanted).float().mean() > (before == wanted).float().mean() + 0.2


def asks(config: Config, ensemble: Ensemble, pool: Pool, plain: Plain | None = None) -> list[Question]:
    return list(questions(ensemble, pool, config, stream(0), plain))


def image_of(pool: Pool, patches: Tensor, positions: Tensor) -> int:
    """The only one of the pool that has these patches (J, E) there."""
    (image,) = [i for i in range(len(pool)) if torch.equal(pool.patches[i, positions], patches)]
    return image


@pytest.mark.parametrize(("mode", "keep"), [("none", 0.6), ("drop", 1.0), ("tokens", 0.6)])
def test_a_mixtures_labels_belong_to_its_tokens(mode: str, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is one image's, with its place, pseudo-label and density there; shares are those of the tokens."""
    monkeypatch.setattr(module, "KEEP", keep)
    config = settings(**{"relabel.mode": mode})
    ensemble, pool = alone(), inverted_pool(config, alone())
    made = asks(config, ensemble, pool)
    assert sorted(row for question in made for row in question.labels[0].targets.tolist()) == list(range(10))
    for question in made:
        one, other = question.labels
        shown = min(pool.positions.shape[1], round(keep * 16))
        assert question.positions.shape == (len(question.patches), shown)
        assert torch.equal(one.own + other.own, torch.ones(question.positions.shape))
        torch.testing.assert_close((one.share, other.share), (one.own.mean(1), other.own.mean(1)))
        assert one.hard.all()
        for row, (patches, positions) in enumerate(zip(question.patches, question.positions, strict=True)):
            for token, position in enumerate(positions.tolist()):
                image = image_of(pool, patches[token], positions[token])
                asked = one if one.own[row, token] else other
                assert asked.targets[row] == pool.targets[image]
                seen_at = pool.positions[image].tolist().index(position)
                assert asked.dense[row, token] == pool.dense[image, seen_at]


def test_images_without_a_dense_patch_have_no_pseudo_label() -> None:
    config = settings(**{"inversion.mode": "pri4"})
    ensemble, pool = alone(), inverted_pool(config, alone())
    made = asks(config, ensemble, pool)
    hard = sum(int(question.labels[0].hard.sum()) for question in made)
    assert 2 * hard == len(pool) == sum(len(question.patches) for question in made)


def test_a_share_is_uniform_and_each_image_has_its_own_choice_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2000)
    config = settings(**{"model.patch-size": 1})  # 64 patches
    every = torch.arange(64).expand(2000, -1)
    dense = torch.ones(2000, 64, dtype=torch.bool)
    pool = Pool(torch.zeros(2000, 64, 1), every, dense, dense, torch.zeros(2000).long(), torch.zeros(2000), 1)
    (question,) = asks(config, alone(patch=1), pool)
    share = question.labels[0].share
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / 12 + 1 / 6 / 32, abs=0.01)  # of λ, and of 32 draws with it
    assert question.positions.shape == (2000, 32)
    assert len({tuple(sorted(row)) for row in question.positions.tolist()}) == 2000


def test_teachers_see_what_the_student_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(**{"data.flip": True})
    ensemble, pool = alone(), inverted_pool(config, alone())
    by_student, by_teachers = [], []
    scores = ensemble.scores

    def student_asked(vit: VisionTransformer, *shown: Tensor) -> TokenLogits:
        by_student.append(shown)
        return forward_tokens(vit, *shown)

    def teachers_asked(*shown: Tensor) -> TokenLogits:
        by_teachers.append(shown)
        return scores(*shown)

    monkeypatch.setattr(module, "forward_tokens", student_asked)
    monkeypatch.setattr(ensemble, "scores", teachers_asked)
    for plain, patches in ((None, 8), (Plain(4.0), 16), (HALVED, 16)):
        by_student.clear()
        by_teachers.clear()
        trained(config, ensemble, pool, plain=plain)
        torch.testing.assert_close(by_student, by_teachers, rtol=0, atol=0)
        assert by_student
        assert all(positions.shape[1] == patches for _, positions in by_student)


@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_plain_lessons_show_images_as_they_were_made(inversion: str) -> None:
    """Neither mixed nor thinned, each once per epoch in an order of its own, also in a pool of two."""
    config = settings(**{"inversion.mode": inversion, "relabel.mode": "none", "distill.epochs-per-round": 2})
    ensemble = alone()
    pool = join([inverted_pool(config, ensemble, 5), inverted_pool(config, ensemble, 5, first=3)])
    shown = []
    for question in asks(config, ensemble, pool, Plain(4.0)):
        for patches, positions in zip(question.patches, question.positions, strict=True):
            pairs = enumerate(zip(pool.positions, pool.patches, strict=True))
            shown += [i for i, (own, whole) in pairs if positions.equal(own) and patches.equal(whole[own])]
    first, second = shown[: len(pool)], shown[len(pool) :]
    assert sorted(first) == sorted(second) == list(range(len(pool)))
    assert first != second


def test_a_plain_loss_is_that_of_the_class_token_on_what_is_seen() -> None:
    """By hand: T² KL at T = 4 of whole images that were moved; a student that never steps."""
    config = settings()
    ensemble, student = alone(), a_vit(config, 7)
    pool, still = inverted_pool(config, ensemble, 4), Sgd(student, 0.0, 1)  # one batch
    seen: list[Parts] = []
    distil(student, ensemble, pool, config, still, stream(0), lambda _, parts: seen.append(parts), HALVED)
    p, q = (model(0.5 * pool.images).div(4).softmax(1) for model in (ensemble, student))
    (parts,) = seen
    torch.testing.assert_close(parts.kd, 16 * (p * (p / q).log()).sum(1).mean())
    assert (parts.high, parts.low) == (0, 0)
    assert parts.total() == parts.kd


def by_two_teachers(inversion: str, seed: int = 0, **changes: object) -> Pool:
    """Three images of 16 patches, 7 of them dense; by `pri4` four times three of 4 patches, the first six dense."""
    config, targets = settings(**{"inversion.mode": inversion, "inversion.steps": 4} | changes), torch.tensor([3, 0, 9])
    return invert(TWO_TEACHERS, targets, config.inversion, config.model, flip=False, rng=stream(seed))


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_what_each_mode_shows(inversion: str) -> None:
    made = by_two_teachers(inversion)
    none, drop, tokens = (relabel(made, mode) for mode in MODES)
    assert torch.equal(none.positions, EVERY)
    assert none.dense.all()
    assert torch.equal(drop.positions, made.dense.nonzero()[:, 1].reshape(3, 7))
    assert drop.dense.all()
    assert drop.dense.shape == (3, 7)
    assert torch.equal(tokens.positions, EVERY)
    assert torch.equal(tokens.dense, made.dense)
    assert all(torch.equal(pool.images, made.images) for pool in (none, drop, tokens))
    everything = by_two_teachers(inversion, **{"inversion.stops": ""})  # where nothing is of low density
    for pool in (relabel(everything, mode) for mode in MODES):
        assert torch.equal(pool.positions.sort(1).values, EVERY)
        assert pool.dense.all()


def test_what_rebirths_look_like_in_each_mode() -> None:
    """The patches of a rebirth are dense or not as a whole: to drop those that are not drops the image."""
    made = by_two_teachers("pri4")
    none, drop, tokens = (relabel(made, mode) for mode in MODES)
    assert torch.equal(none.positions, made.positions)
    assert none.dense.all()
    assert torch.equal(tokens.positions, made.positions)
    assert tokens.dense.any(1).tolist() == tokens.dense.all(1).tolist() == [True] * 6 + [False] * 6
    assert torch.equal(drop.positions, made.positions[:6])
    assert torch.equal(drop.targets, made.targets[:6])
    assert drop.dense.all()


@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_pools_are_joined_row_by_row_and_come_back_from_their_tensors(inversion: str, tmp_path: Path) -> None:
    pools = [by_two_teachers(inversion, seed) for seed in range(3)]
    joined, size = join(pools), len(pools[0])
    assert len(joined) == 3 * size
    for number, pool in enumerate(pools):
        part = joined.rows(torch.arange(number * size, (number + 1) * size))
        assert same(part.tensors(), Pool(**pool.tensors(), patch=pool.patch).tensors())
    joined.save(tmp_path / "pool.safetensors")
    kept, _ = load_tensors(tmp_path / "pool.safetensors")
    assert torch.equal(patchify(kept.pop("images"), 2), joined.patches)
    assert same(kept | {"patches": joined.patches}, joined.tensors())
