"""Relabelling: what each mode shows, and which patches keep the pseudo-label."""

from pathlib import Path

import pytest
import torch
from tiny import an_ensemble, settings
from torch import Tensor

from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import RelabelConfig
from fedmitr_flwr.distillation.pool import Pool, join
from fedmitr_flwr.distillation.relabel import View, relabel
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.result import Inverted

TARGETS = torch.tensor([3, 0, 9])
EVERY = torch.arange(16).expand(3, -1)
MODES = ("none", "drop", "tokens", "complement")
INVERSIONS = ("dense", "sparse", "pri4")


def images(inversion: str, seed: int = 0, **changes: object) -> Inverted:
    """Three images of 16 patches, 7 of them dense; by `pri4` four times three of 4 patches, the first six dense."""
    config = settings(**{"inversion.mode": inversion} | changes)
    ensemble = an_ensemble(config)
    return invert(ensemble, TARGETS, config.inversion, config.model, flip=False, rng=stream(seed))


def looks(inversion: str, mode: str, **changes: object) -> tuple[Inverted, tuple[View, ...]]:
    inverted = images(inversion, **changes)
    return inverted, relabel(inverted, RelabelConfig(mode=mode))


def chosen(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 1].reshape(len(mask), -1)


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_none_shows_everything_with_the_pseudo_label(inversion: str) -> None:
    _, (view,) = looks(inversion, "none")
    assert torch.equal(view.given, EVERY)
    assert view.high.all()
    assert view.hard.all()
    assert view.rows.tolist() == [0, 1, 2]
    assert view.soft == "tokens"


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_drop_shows_the_dense_patches_only(inversion: str) -> None:
    inverted, (view,) = looks(inversion, "drop")
    assert torch.equal(view.given, chosen(inverted.high))
    assert view.given.shape == (3, 7)
    assert view.high.all()
    assert view.hard.all()
    assert view.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_tokens_shows_everything_and_softens_the_rest(inversion: str) -> None:
    inverted, (view,) = looks(inversion, "tokens")
    assert torch.equal(view.given, EVERY)
    assert torch.equal(view.high, inverted.high)
    assert view.high.sum(1).tolist() == [7, 7, 7]
    assert view.hard.all()
    assert view.soft == "tokens"


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_complement_shows_the_rest_as_an_image_of_its_own(inversion: str) -> None:
    inverted, (dense, rest) = looks(inversion, "complement")
    assert torch.equal(dense.given, chosen(inverted.high))
    assert torch.equal(rest.given, chosen(~inverted.high))
    assert rest.given.shape == (3, 9)
    assert not rest.high.any()
    assert not rest.hard.any()
    assert (dense.soft, rest.soft) == ("tokens", "cls")
    assert rest.rows.tolist() == [0, 1, 2]


def test_what_rebirths_look_like_in_each_mode() -> None:
    """The patches of a rebirth are dense or not as a whole; later rebirths have no pseudo-label where it matters."""
    inverted, (view,) = looks("pri4", "none")
    assert torch.equal(view.given, inverted.given)
    assert view.high.all()
    assert view.hard.all()
    _, (view,) = looks("pri4", "tokens")
    assert torch.equal(view.given, inverted.given)
    assert view.hard.tolist() == [True] * 6 + [False] * 6
    assert torch.equal(view.high, inverted.high)
    _, (view,) = looks("pri4", "drop")
    assert torch.equal(view.given, inverted.given[:6])
    assert view.rows.tolist() == list(range(6))
    assert view.hard.all()
    _, (dense, rest) = looks("pri4", "complement")
    assert torch.equal(dense.given, inverted.given[:6])
    assert torch.equal(rest.given, inverted.given[6:])
    assert rest.rows.tolist() == list(range(6, 12))
    assert not rest.hard.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_where_nothing_is_of_low_density_there_is_one_view_of_everything(inversion: str, mode: str) -> None:
    _, (view,) = looks(inversion, mode, **{"inversion.stops": ""})
    assert torch.equal(view.given.sort(1).values, EVERY)
    assert view.high.all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_pools_are_joined_row_by_row(inversion: str, mode: str) -> None:
    pools = []
    for seed in range(3):
        inverted = images(inversion, seed)
        pools.append(Pool.of(inverted, relabel(inverted, RelabelConfig(mode=mode))))
    joined = join(pools)
    assert len(joined) == 3 * len(pools[0])
    assert torch.equal(joined.images, torch.cat([pool.images for pool in pools]))
    assert torch.equal(joined.alive, torch.cat([pool.alive for pool in pools]))
    for number, view in enumerate(joined.views):
        parts = [(pool, pool.views[number]) for pool in pools]
        assert len(view) == sum(len(part) for _, part in parts)
        assert view.soft == parts[0][1].soft
        for name in ("given", "high", "hard"):
            assert torch.equal(getattr(view, name), torch.cat([getattr(part, name) for _, part in parts]))
        assert torch.equal(joined.images[view.rows], torch.cat([pool.images[part.rows] for pool, part in parts]))


def test_a_pool_on_disk_has_all_its_parts(tmp_path: Path) -> None:
    inverted = images("sparse")
    pool = Pool.of(inverted, relabel(inverted, RelabelConfig(mode="complement")))
    pool.save(tmp_path / "pool.safetensors")
    tensors, header = load_tensors(tmp_path / "pool.safetensors")
    assert header == {"soft": ["tokens", "cls"]}
    assert torch.equal(tensors["images"], pool.images)
    assert torch.equal(tensors["alive"], inverted.alive)
    assert torch.equal(tensors["targets"], TARGETS)
    assert torch.equal(tensors["loss"], inverted.loss)
    for number, view in enumerate(pool.views):
        for name in ("rows", "given", "high", "hard"):
            assert torch.equal(tensors[f"view{number}.{name}"], getattr(view, name))
    assert len(tensors) == 4 + 2 * 4
