"""Partitions: every image once, the skew that the setting promises, equal for equal seeds, refused in one line."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.config import PartitionConfig
from fedmitr_flwr.data.partition import Partition, holdout, split

Y = 10
LABELS = torch.arange(2000) % Y  # 200 images of each class
SCHEMES = ("dirichlet", "classes-per-client", "iid")


def config(scheme: str = "dirichlet", **settings: object) -> PartitionConfig:
    return PartitionConfig(scheme=scheme, **settings)  # type: ignore[arg-type]


def test_equal_seeds_give_equal_partitions_and_other_seeds_others() -> None:
    for scheme in SCHEMES:
        hashes = []
        for seed in (0, 0, 1):
            torch.rand(1)  # the global generator has no part in it
            hashes.append(split(LABELS, config(scheme), Y, seed).sha256)
        assert hashes[0] == hashes[1] != hashes[2]
    dealt, counts = ([[0, 1], [2]], [[2], [0, 1]], [[0], [1, 2]], [[0, 1, 2]]), torch.zeros(2, Y)
    assert len({Partition(tuple(map(torch.tensor, parts)), counts).sha256 for parts in dealt}) == 4


def test_dirichlet_is_more_skewed_for_smaller_alpha_and_iid_sizes_differ_by_one_at_most() -> None:
    uniform = split(LABELS, config(alpha=1e6), Y, seed=0).counts
    assert (uniform - 40).abs().max() <= 2  # 200 images of a class over 5 clients
    one_client_each = split(LABELS, config(alpha=1e-3, clients=2), Y, seed=0).counts
    assert (one_client_each.max(0).values >= 190).all()
    sizes = [len(part) for part in split(LABELS[:1999], config("iid", clients=7), Y, seed=0).indices]
    assert max(sizes) - min(sizes) == 1
    assert sum(sizes) == 1999


def test_classes_per_client_gives_exactly_that_many_and_leaves_no_class_out(caplog: pytest.LogCaptureFixture) -> None:
    """Where there are enough clients; if not, it is said which. Classes without an image are never dealt."""

    def dealt(clients: int, classes: int = 2, labels: torch.Tensor = LABELS) -> torch.Tensor:
        wanted = config("classes-per-client", clients=clients, classes_per_client=classes)
        counts = split(labels, wanted, Y, seed=4).counts
        assert ((counts > 0).sum(1) == classes).all()
        return counts

    for clients, classes in ((10, 1), (4, 3), (2, 9), (3, 10)):
        counts = dealt(clients, classes)
        assert counts.sum(0).tolist() == [200] * Y  # clients * classes >= Y
        holders = (counts > 0).sum(0)
        assert holders.max() - holders.min() <= 1
    with caplog.at_level(logging.WARNING, "fedmitr"):
        unused = (dealt(3).sum(0) == 0).nonzero().flatten().tolist()
    assert len(unused) == Y - 6
    assert str(unused) in caplog.text
    assert dealt(3, labels=torch.tensor([1, 4, 7]).repeat(100)).sum(0).nonzero().flatten().tolist() == [1, 4, 7]


@given(st.integers(2, 12), st.sampled_from(SCHEMES), st.integers(0, 2**40), st.integers(12, 300))
def test_a_partition_is_disjoint_and_large_enough_or_refused(clients: int, scheme: str, seed: int, total: int) -> None:
    labels = torch.arange(total) % 4
    wanted = config(scheme, clients=clients, min_size=3)
    try:
        parts = split(labels, wanted, 4, seed)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "partition." in refusal
        assert "\n" not in refusal
        return
    together = torch.cat(parts.indices).tolist()
    assert len(set(together)) == len(together)
    assert len(together) == total or clients * wanted.classes_per_client < 4
    assert parts.counts.shape == (clients, 4)
    for indices, row in zip(parts.indices, parts.counts, strict=True):
        assert len(indices) >= 3
        assert indices.tolist() == sorted(indices.tolist())
        assert row.tolist() == torch.bincount(labels[indices], minlength=4).tolist()


def test_impossible_partitions_are_refused_in_one_line() -> None:
    per_client = {"scheme": "classes-per-client"}
    two = torch.tensor([0] * 100 + [1] * 4)
    for labels, settings, named in (
        (LABELS, {"clients": 2001, "min_size": 1}, "2001 clients .* 2000; lower .*number of clients"),
        (LABELS, {"clients": 100, "min_size": 21}, "min-size = 21 need 2100 images, but there are 2000"),
        (LABELS, {"alpha": 1e-6, "clients": 30}, "30 clients with partition.alpha = 1e-06 .* raise partition.alpha"),
        (LABELS, {"alpha": 1e308}, r"partition.alpha = 1e\+308"),
        (LABELS, {"scheme": "iid", "clients": 300, "min_size": 7}, "300 clients .* 2100"),
        (LABELS, per_client | {"clients": 1000, "min_size": 1, "classes_per_client": 3}, "classes-per-client = 3"),
        (LABELS, per_client | {"classes_per_client": 11}, "partition.classes-per-client = 11, but .* 10"),
        (two, per_client | {"clients": 2, "classes_per_client": 1}, "would get 4 images"),
    ):
        with pytest.raises(ConfigError, match=f"^.*{named}.*$") as caught:
            split(labels, config(**settings), int(labels.max()) + 1, seed=0)
        assert "\n" not in str(caught.value)


def test_what_is_held_out_depends_on_size_seed_and_client_only() -> None:
    for size, share, held in ((100, 0.1, 10), (3, 0.1, 1), (2, 0.9, 1), (10, 0.9, 9), (7, 0.5, 4)):
        indices = torch.arange(50, 50 + size)
        train, out = holdout(indices, share, seed=0, client=3)
        assert len(out) == held
        assert torch.cat([train, out]).sort().values.tolist() == indices.tolist()
    ways = ((0, 1), (0, 1), (1, 1), (0, 2))
    first, again, seed, client = (holdout(torch.arange(100), 0.2, *way)[1].tolist() for way in ways)
    assert first == again
    assert first not in (seed, client)
    with pytest.raises(ConfigError, match=r"client 3 .*\(1\).*partition.min-size = 2"):
        holdout(torch.tensor([8]), 0.1, seed=0, client=3)
