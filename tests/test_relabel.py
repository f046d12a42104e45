"""Relabelling: what each mode shows, and which patches keep the pseudo-label. Pools on disk, and joined."""

from pathlib import Path

import pytest
import torch
from tiny import an_ensemble, settings

from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.distillation.relabel import relabel
from fedmitr_flwr.inversion.invert import invert
from fedmitr_flwr.inversion.pool import Pool, join

TARGETS = torch.tensor([3, 0, 9])
EVERY = torch.arange(16).expand(3, -1)
MODES = ("none", "drop", "tokens")
INVERSIONS = ("dense", "sparse", "pri4")


def images(inversion: str, seed: int = 0, **changes: object) -> Pool:
    """Three images of 16 patches, 7 of them dense; by `pri4` four times three of 4 patches, the first six dense."""
    config = settings(**{"inversion.mode": inversion} | changes)
    ensemble = an_ensemble(config)
    return invert(ensemble, TARGETS, config.inversion, config.model, flip=False, rng=stream(seed))


@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_what_each_mode_shows(inversion: str) -> None:
    made = images(inversion)
    assert made.dense.sum(1).tolist() == [7, 7, 7]
    none, drop, tokens = (relabel(made, mode) for mode in MODES)
    assert torch.equal(none.positions, EVERY)
    assert none.dense.all()
    assert torch.equal(drop.positions, made.dense.nonzero()[:, 1].reshape(3, 7))
    assert drop.dense.all()
    assert drop.dense.shape == (3, 7)
    assert torch.equal(tokens.positions, EVERY)
    assert torch.equal(tokens.dense, made.dense)
    for pool in (none, drop, tokens):
        assert torch.equal(pool.images, made.images)


def test_what_rebirths_look_like_in_each_mode() -> None:
    """The patches of a rebirth are dense or not as a whole: to drop those that are not drops the image."""
    made = images("pri4")
    none, drop, tokens = (relabel(made, mode) for mode in MODES)
    assert torch.equal(none.positions, made.positions)
    assert none.dense.all()
    assert torch.equal(tokens.positions, made.positions)
    assert tokens.dense.any(1).tolist() == tokens.dense.all(1).tolist() == [True] * 6 + [False] * 6
    assert torch.equal(drop.positions, made.positions[:6])
    assert torch.equal(drop.targets, made.targets[:6])
    assert drop.dense.all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inversion", ["dense", "sparse"])
def test_where_nothing_is_of_low_density_everything_keeps_its_label(inversion: str, mode: str) -> None:
    pool = relabel(images(inversion, **{"inversion.stops": ""}), mode)
    assert torch.equal(pool.positions.sort(1).values, EVERY)
    assert pool.dense.all()


@pytest.mark.parametrize("inversion", INVERSIONS)
def test_pools_are_joined_row_by_row_and_come_back_from_their_tensors(inversion: str) -> None:
    pools = [images(inversion, seed) for seed in range(3)]
    joined = join(pools)
    size = len(pools[0])
    assert len(joined) == 3 * size
    for number, pool in enumerate(pools):
        part = joined.rows(torch.arange(number * size, (number + 1) * size))
        for name, tensor in Pool(**pool.tensors(), patch=pool.patch).tensors().items():
            assert torch.equal(part.tensors()[name], tensor), name


def test_a_pool_on_disk_has_images_and_what_is_known_of_their_patches(tmp_path: Path) -> None:
    pool = images("sparse")
    pool.save(tmp_path / "pool.safetensors")
    tensors, _ = load_tensors(tmp_path / "pool.safetensors")
    assert set(tensors) == {"images", "positions", "dense", "alive", "targets", "loss"}
    assert tensors["images"].shape == (3, 1, 8, 8)
    assert torch.equal(tensors["images"], pool.images)
    assert torch.equal(tensors["dense"], pool.dense)
    assert torch.equal(tensors["targets"], TARGETS)
