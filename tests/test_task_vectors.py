"""Merges of the clients' updates: WUDI, TSV-M, TIES, task arithmetic."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import an_upload, fused, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.merging import task_vectors
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.task_vectors import HOLD, tsv, wudi
from fedmitr_flwr.methods import ties
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights, vit_of

Merge = Callable[..., dict[str, Tensor]]
LAYER = "blocks.0.mlp.fc1.weight"
SIZES = (10, 30, 20)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


def merged_update(merge: Merge, updates: Sequence[Tensor]) -> Tensor:
    """Of one matrix, from a start of its own."""
    start = {LAYER: drawn(*updates[0].shape, seed=99)}
    uploads = [
        Upload(client, {LAYER: start[LAYER] + own}, SIZES[client], 0.5, "") for client, own in enumerate(updates)
    ]
    return merge(uploads, start)[LAYER] - start[LAYER]


def two_uploads() -> list[Upload]:
    return [an_upload(settings(), client, 10 + 20 * client) for client in range(2)]


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
