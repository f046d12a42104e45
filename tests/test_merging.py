"""Models made of the uploads alone: FedMedian, Krum, WUDI, TSV-M, TIES, task arithmetic, and RegMean with its moments.

Numbers by hand, Flower's own implementations, and what a hostile upload can do.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st
from tiny import CPU, a_vit, an_upload, fused, same, settings, small, some_images, two_uploads
from torch import Tensor

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.common.errors import ConfigError, RunError, UploadError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import UploadConfig
from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.merging import task_vectors
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.regmean import regmean
from fedmitr_flwr.merging.task_vectors import HOLD, tsv, wudi
from fedmitr_flwr.methods import ties
from fedmitr_flwr.methods.contract import Fused
from fedmitr_flwr.methods.fedmedian import median
from fedmitr_flwr.methods.krum import choose, scores
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics.inputs import REST, leading, like, measure, moment, second_moments, widths
from fedmitr_flwr.uploads.updates import gram, squared_distances
from fedmitr_flwr.uploads.upload import Upload, narrowed, validate
from fedmitr_flwr.vit.build import initial_weights, vit_of
from fedmitr_flwr.vit.tokens import patchify

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


# --- RegMean: second moments of what layers are given, from client to server, and what is merged by them

CONFIG, SENT = settings(), settings(**{"upload.extras": "moments", "upload.dtype": "float16"})
LAYERS = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]
QKV = "inputs/blocks.0.attn.qkv"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _few_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmitr_flwr.statistics.inputs.DIRECTIONS", 3)  # of 17 and more inputs


def a_moment(width: int) -> np.ndarray:
    x = RNG.normal(size=(3 * width, width))
    return x.T @ x / len(x)


def linear(*moments: np.ndarray) -> list[Upload]:
    """Uploads of 10 and 30 images, of one layer with 4 inputs and the constant, 3 outputs."""
    made = []
    for client, moment_II in enumerate(moments):
        layer_OI = torch.randn(3, 5, generator=stream(client))
        rows, rest = leading(torch.from_numpy(moment_II), 5)
        told = {"inputs/a": rows, REST: rest[None]}
        weights = {"a.weight": layer_OI[:, :4], "a.bias": layer_OI[:, 4]}
        made.append(Upload(client, weights, 10 + 20 * client, 0.5, "0" * 12, statistics=told))
    return made


def joined(weights: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([weights["a.weight"], weights["a.bias"][:, None]], dim=1).double().numpy()


def test_the_layers_of_a_vision_transformer_are_all_found() -> None:
    found = widths(a_vit(CONFIG, 0).state_dict())
    assert {layer for layer in found if "blocks.1" not in layer} == set(LAYERS)
    assert [found[layer] for layer in LAYERS] == [5, 17, 17, 17, 65, 17]
    assert list(found) == sorted(found)


@torch.no_grad()
def test_second_moments_are_those_of_what_layers_are_given() -> None:
    """Against numpy, where a layer's inputs are known without asking it: patches, class tokens, normed tokens."""
    vit, images = a_vit(CONFIG, 0), client_images(CONFIG, 0)[0]
    found = second_moments(vit, images, small(), CPU)
    shown = prepare(images.pixels, small())
    tokens = vit._pos_embed(vit.patch_embed(shown))
    inputs = {
        "patch_embed.proj": patchify(shown, 2),
        "blocks.0.attn.qkv": vit.blocks[0].norm1(tokens),
        "head": vit.forward_head(vit.forward_features(shown), pre_logits=True),
    }
    for layer, shown_to in inputs.items():
        x = shown_to.flatten(0, -2).double().numpy()
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        np.testing.assert_allclose(found[layer].numpy(), x.T @ x / len(x), atol=1e-5)


@pytest.mark.parametrize("kept", [2, 6])
def test_few_directions_have_its_leading_eigenvalues_and_its_trace(kept: int) -> None:
    """And all directions are the whole moment."""
    wanted = a_moment(6)
    rows, rest = leading(torch.from_numpy(wanted), kept)
    assert rows.shape == (kept, 6)
    values, vectors = np.linalg.eigh(wanted)
    values[: 6 - kept] = mean = values[: 6 - kept].mean() if kept < 6 else 0.0
    assert rest.item() == pytest.approx(mean)
    np.testing.assert_allclose(moment(rows, rest).numpy(), vectors * values @ vectors.T, atol=1e-5)
    for scale in (0.3, 3.3, 0.17):  # the mean of equal eigenvalues may be rounded to more than each of them
        wanted = scale * torch.eye(11, dtype=torch.float64)
        torch.testing.assert_close(moment(*leading(wanted, 2)), wanted, atol=1e-6, rtol=0)


def test_a_layer_is_merged_by_the_closed_form() -> None:
    """Against numpy: (Σ n_k W_k G_k / tr G_k) (Σ n_k G_k / tr G_k)^-1."""
    moments = [a_moment(5), 7 * a_moment(5)]
    uploads = linear(*moments)
    shares = [upload.num_examples * one / np.trace(one) for upload, one in zip(uploads, moments, strict=True)]
    cross = sum(joined(upload.weights) @ one for upload, one in zip(uploads, shares, strict=True))
    np.testing.assert_allclose(joined(regmean(uploads)), cross @ np.linalg.inv(sum(shares)), atol=1e-4)


def test_equal_moments_give_the_average_and_what_nobody_was_given_stays_averaged() -> None:
    full, empty = a_moment(5), np.zeros((5, 5))
    empty[:3, :3] = a_moment(3)
    for moment_II in (full, empty):
        uploads = linear(moment_II, moment_II)
        np.testing.assert_allclose(joined(regmean(uploads)), joined(average(uploads)), atol=1e-4)


def test_each_client_is_answered_as_its_own_layer_does_where_only_it_has_inputs() -> None:
    """Inputs of one lie in the first two places, of the other in the others: nothing has to give way."""
    moments = [np.zeros((5, 5)), np.zeros((5, 5))]
    moments[0][:2, :2], moments[1][2:, 2:] = a_moment(2), a_moment(3)
    uploads = linear(*moments)
    merged = joined(regmean(uploads))
    np.testing.assert_allclose(merged[:, :2], joined(uploads[0].weights)[:, :2], atol=1e-4)
    np.testing.assert_allclose(merged[:, 2:], joined(uploads[1].weights)[:, 2:], atol=1e-4)


def test_equal_clients_are_merged_to_themselves_and_of_others_norms_tokens_and_positions_are_averaged() -> None:
    for seeds in ((5, 5), (0, 1)):
        uploads = []
        for client, seed in enumerate(seeds):
            told = measure(a_vit(CONFIG, seed), client_images(CONFIG, client)[0], CONFIG.model, CPU)
            uploads.append(replace(an_upload(CONFIG, client, 10 + client, seed=seed), statistics=told))
        merged, mean = regmean(uploads), average(uploads)
        if seeds == (5, 5):
            torch.testing.assert_close(merged, mean, atol=1e-4, rtol=0)
    solved = {f"{layer}.{kind}" for layer in widths(mean) for kind in ("weight", "bias")}
    assert {name for name in mean if not torch.equal(merged[name], mean[name])} == solved
    assert merged.keys() == mean.keys()


@cache
def sent() -> Upload:
    return pipeline.train_client(SENT, 0, initial_weights(SENT.model, SENT.seed))


def check(upload: Upload, asked: UploadConfig = SENT.upload) -> None:
    validate(upload, initial_weights(SENT.model, SENT.seed), replace(SENT, upload=asked), upload.fingerprint)


def test_a_client_measures_the_model_that_it_sends() -> None:
    upload = sent()
    check(upload)
    assert upload.class_counts is None
    plain = pipeline.train_client(settings(), 0, initial_weights(SENT.model, SENT.seed))
    assert same(upload.weights, {name: tensor.half() for name, tensor in plain.weights.items()})
    own = measure(vit_of(SENT.model, plain.weights), client_images(SENT, 0)[0], SENT.model, CPU)
    assert same(upload.statistics, {name: tensor.half() for name, tensor in own.items()})
    wanted = like(upload.weights)
    assert all(tensor.shape == wanted[name].shape for name, tensor in upload.statistics.items())
    assert upload.num_bytes == plain.num_bytes // 2 + 2 * sum(tensor.numel() for tensor in wanted.values())


def test_what_cannot_be_second_moments_is_refused_by_name() -> None:
    told = sent().statistics
    nothing = torch.zeros(3, 17, dtype=torch.float16)
    for statistics, problem in (
        ({**told, REST: -told[REST]}, "inputs/rest has a negative number; do not edit uploads"),
        ({**told, REST: 0 * told[REST], QKV: nothing}, f"{QKV} says that the layer was given nothing"),
        ({**told, QKV: told[QKV][:2]}, rf"{QKV} has the shape \(2, 17\), not \(3, 17\)"),
        ({**told, QKV: told[QKV].double()}, f"{QKV} is float64; it must be float32 or float16"),
        ({**told, QKV: told[QKV] * float("nan")}, f"NaN or infinity in '{QKV}'"),
        ({name: told[name] for name in told if name != QKV}, r"its statistics are \['inputs/bl"),
        ({**told, "sums": torch.ones(1)}, r"its statistics are \[.*\(.*upload.extras"),
        (None, r"its statistics are \[\], not \['inputs/"),
    ):
        with pytest.raises(UploadError, match=f"^client 0: .*{problem}"):
            check(replace(sent(), statistics=statistics))
    with pytest.raises(UploadError, match=r"its statistics are \['inputs/.*, not \[\]"):
        check(sent(), UploadConfig(dtype="float16"))
    assert narrowed(sent(), UploadConfig()).statistics is None
    assert narrowed(sent(), SENT.upload).statistics == sent().statistics


def test_the_whole_line(tmp_path: Path) -> None:
    """Run by RegMean, fused again without what it needed: fewer bytes, and no way back."""
    folder = pipeline.run(settings(method="regmean", **{"upload.extras": "moments", "out-dir": str(tmp_path)}))
    result = folder.read_result()
    sizes = [4 * sum(tensor.numel() for tensor in like(initial_weights(CONFIG.model, 0)).values())] * 2
    assert result["bytes_statistics"] == sizes
    assert same(load_tensors(folder.model_path)[0], regmean(folder.load_uploads()))
    less: RunFolder = pipeline.fuse(folder, "fedavg", {"upload.extras": ""})
    told = less.read_result()
    assert "bytes_statistics" not in told
    assert [all_ - few for all_, few in zip(result["bytes_up"], told["bytes_up"], strict=True)] == sizes
    with pytest.raises(RunError, match=r"upload\.extras = 'counts', but the uploads were made with 'moments'"):
        pipeline.fuse(folder, "fedavg", {"upload.extras": "counts"})
