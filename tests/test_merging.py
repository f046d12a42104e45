"""Models made of the uploads alone: FedMedian and Krum, WUDI, TSV-M, TIES and task arithmetic.

Numbers by hand, Flower's own implementations, and what a hostile upload can do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from tiny import an_upload, fused, same, settings, some_images, two_uploads
from torch import Tensor

from fedmitr_flwr import methods
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.merging import task_vectors
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.task_vectors import HOLD, tsv, wudi
from fedmitr_flwr.methods import ties
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.methods.fedmedian import median
from fedmitr_flwr.methods.krum import choose, scores
from fedmitr_flwr.uploads.updates import gram, squared_distances
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights, vit_of

Merge = Callable[..., dict[str, Tensor]]
LAYER = "blocks.0.mlp.fc1.weight"
SIZES = (10, 30, 20)


def points(*places: float) -> list[Upload]:
    """Uploads with one number each."""
    return [Upload(client, {"w": torch.tensor([float(place)])}, 1, 0.0, "") for client, place in enumerate(places)]


def made_by(method: str, uploads: Sequence[Upload], **changes: Any) -> tuple[Fused, list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    return fused(settings(method=method, **{"partition.clients": len(uploads)}, **changes), uploads, lines), lines


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_median_is_numpys(rows: list[list[float]]) -> None:
    values = np.array(rows, np.float32)
    np.testing.assert_allclose(
        median(torch.from_numpy(values)).numpy(), np.median(values.astype(np.float64), axis=0), rtol=1e-12
    )


def test_fedmedian_is_the_median_of_every_number() -> None:
    uploads = [an_upload(settings(), client, 10 + client) for client in range(6)]
    made, _ = made_by("fedmedian", uploads)
    for name, tensor in made.weights.items():
        every = np.stack([upload.weights[name].double().numpy() for upload in uploads])
        np.testing.assert_allclose(tensor.numpy(), np.median(every, axis=0), rtol=1e-6, atol=1e-9)
        assert tensor.dtype == uploads[0].weights[name].dtype
    assert same(dict(made.predict.state_dict()), dict(made.weights))


def test_a_minority_cannot_drag_the_median_away() -> None:
    """Whatever two of five send, each number stays between those of the other three."""
    good = [an_upload(settings(), client) for client in range(3)]
    evil = [replace(good[0], weights={name: by * w for name, w in good[0].weights.items()}) for by in (1e6, -1e6)]
    made, _ = made_by("fedmedian", [evil[0], *good, evil[1]])
    for name, tensor in made.weights.items():
        honest = torch.stack([upload.weights[name] for upload in good])
        assert (tensor >= honest.min(0).values).all()
        assert (tensor <= honest.max(0).values).all()


def test_distances_are_those_of_the_vectors() -> None:
    uploads = [an_upload(settings(), client) for client in range(4)]
    vectors = torch.stack([torch.cat([w.double().flatten() for w in upload.weights.values()]) for upload in uploads])
    for origin in (uploads[2].weights, {name: torch.zeros_like(w) for name, w in uploads[0].weights.items()}):
        found = squared_distances(gram(uploads, origin))
        torch.testing.assert_close(found, torch.cdist(vectors, vectors) ** 2, rtol=1e-9, atol=1e-9)


def test_krum_by_hand() -> None:
    """0, 3, 4, 6, 90 with f = 1: two nearest each. 0: 9 + 16; 3: 1 + 9; 4: 1 + 4; 6: 4 + 9; 90: 84² + 86²."""
    uploads = points(0, 3, 4, 6, 90)
    distances = squared_distances(gram(uploads, uploads[0].weights))
    assert scores(distances, hostile=1).tolist() == [25, 10, 5, 13, 84**2 + 86**2]
    assert choose(uploads, hostile=1).client == 2
    # With f = 0 three neighbours count: 3 -> 1 + 9 + 9, 4 -> 1 + 4 + 16.
    assert scores(distances, hostile=0)[:3].tolist() == [9 + 16 + 36, 19, 21]
    assert choose(uploads, hostile=0).client == 1


@pytest.mark.parametrize("hostile", [0, 1, 2])
def test_krum_is_flowers(hostile: int) -> None:
    uploads = [an_upload(settings(), client) for client in range(6)]
    replies = [RecordDict({"arrays": ArrayRecord(dict(upload.weights))}) for upload in uploads]
    (theirs,) = select_multikrum(replies, hostile, 1)
    made, lines = made_by("krum", uploads, **{"krum.hostile": hostile})
    assert same(dict(made.weights), dict(theirs["arrays"].to_torch_state_dict()))
    assert lines == [{"stage": "krum", "client": [reply is theirs for reply in replies].index(True)}]
    assert same(dict(made.predict.state_dict()), dict(made.weights))


def test_krum_needs_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"krum.hostile = 1 needs 4 uploads, not 3; lower krum.hostile"):
        methods.check(settings(method="krum"), 3)
    methods.check(settings(method="krum"), 4)
    with pytest.raises(ConfigError, match="needs 5 uploads, not 4"):
        choose(points(0, 1, 2, 3), hostile=2)


# --- of updates


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def merged_update(merge: Merge, updates: Sequence[Tensor]) -> Tensor:
    """Of one matrix, from a start of its own."""
    start = {LAYER: drawn(*updates[0].shape, seed=99)}
    uploads = [
        Upload(client, {LAYER: start[LAYER] + own}, SIZES[client], 0.5, "") for client, own in enumerate(updates)
    ]
    return merge(uploads, start)[LAYER] - start[LAYER]


def test_wudi_is_where_its_loss_is_least() -> None:
    """The loss of the paper with the ridge, written out; its gradient by autograd is 0 at the closed form."""
    updates = list(drawn(3, 5, 4))
    found = merged_update(wudi, updates).requires_grad_()
    mean = sum(size / sum(SIZES) * update for size, update in zip(SIZES, updates, strict=True))
    interference, traces = torch.zeros(()), torch.zeros(())
    for update in updates:
        norm = update.square().sum()
        interference = interference + ((found - update) @ update.T).square().sum() / norm
        traces = traces + (update.T @ update / norm).trace()
    (interference + HOLD * traces / 4 * (found - mean).square().sum()).backward()
    torch.testing.assert_close(found.grad, torch.zeros(5, 4, dtype=torch.float64), atol=1e-10, rtol=0)


def test_updates_of_inputs_that_have_nothing_in_common_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each client changed for its own inputs, the merged layer changes for them: the sum, not the mean."""
    monkeypatch.setattr(task_vectors, "HOLD", 1e-9)
    directions, _ = torch.linalg.qr(drawn(6, 6, seed=1))
    updates = [drawn(5, 2, seed=2 + k) @ directions[2 * k : 2 * k + 2] for k in range(3)]
    torch.testing.assert_close(merged_update(wudi, updates), sum(updates), atol=1e-6, rtol=0)


def test_tsv_keeps_the_leading_directions_of_each_client() -> None:
    """Rank 2 of 6 for each of three clients; orthogonal factors need no change, so their sum is the result."""
    left, right = (torch.linalg.qr(drawn(6, 6, seed=seed))[0] for seed in (1, 2))
    parts = [slice(2 * k, 2 * k + 2) for k in range(3)]
    values = torch.tensor([3.0, 2.0], dtype=torch.float64)
    updates = [left[:, part] * values @ right[part] for part in parts]
    weaker = [0.1 * torch.outer(left[:, (2 * k + 3) % 6], right[(2 * k + 3) % 6]) for k in range(3)]  # third value: cut
    both = [update + small for update, small in zip(updates, weaker, strict=True)]
    torch.testing.assert_close(merged_update(tsv, both), sum(updates), atol=1e-9, rtol=0)


@pytest.mark.parametrize("merge", [wudi, tsv])
def test_one_client_gets_its_own_layer_and_others_are_averaged(merge: Merge) -> None:
    assert not merged_update(merge, [torch.zeros(5, 4)] * 2).any()  # where no client moved
    torch.testing.assert_close(merged_update(merge, [drawn(5, 4)]), drawn(5, 4))
    found, mean = merge(two_uploads(), initial_weights(settings().model, 0)), average(two_uploads())
    differ = {name for name in found if not torch.allclose(found[name], mean[name], atol=1e-6)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert differ == {f"blocks.{b}.{layer}.weight" for b in (0, 1) for layer in layers}
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_ties_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of six numbers is kept; then the sign with the larger sum; then the mean of those that have it."""
    monkeypatch.setattr(ties, "DENSITY", 0.5)
    updates = torch.tensor([[4.0, -3.0, 2.0, 1.0, 0.0, 0.5], [2.0, 5.0, -1.0, 0.5, 3.0, 0.0]])
    limits = torch.stack([ties.least_kept({"w": update}, {"w": torch.zeros(6)}) for update in updates])
    assert limits.tolist() == [2.0, 2.0]
    wanted = torch.tensor([3.0, 5.0, 2.0, 0.0, 3.0, 0.0])
    torch.testing.assert_close(ties.elected_mean(updates, limits), wanted)


@pytest.mark.parametrize("name", ["wudi", "tsv", "ties", "task_arithmetic"])
@torch.no_grad()
def test_the_methods_give_one_model(name: str) -> None:
    config = settings(method=name)
    made, images = fused(config), some_images(config, 2)
    assert all(tensor.isfinite().all() for tensor in made.weights.values())
    if name == "task_arithmetic":
        start = initial_weights(config.model, config.seed)["head.weight"]
        update = sum(upload.weights["head.weight"] - start for upload in two_uploads())
        torch.testing.assert_close(made.weights["head.weight"], start + 0.3 * update)
    torch.testing.assert_close(made.predict(images), vit_of(config.model, made.weights)(images))
