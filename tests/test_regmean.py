"""RegMean: second moments of what layers are given, their way from client to server, and what is merged by them."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, a_vit, an_upload, same, settings, small
from torch import Tensor

from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import RunError, UploadError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import UploadConfig
from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.merging.regmean import regmean
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.statistics.inputs import REST, leading, like, measure, moment, second_moments, widths
from fedmitr_flwr.uploads.upload import Upload, narrowed, validate
from fedmitr_flwr.vit.build import initial_weights, vit_of
from fedmitr_flwr.vit.tokens import patchify

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
    for layer, given in inputs.items():
        x = given.flatten(0, -2).double().numpy()
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
