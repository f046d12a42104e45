"""How networks and their public start are made: plain timm models, equal for equal seeds, misfits refused by name."""

import json
import math
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from tiny import a_vit, same, settings, some_images
from torch import Tensor

from fedmitr_flwr.common.errors import ModelError
from fedmitr_flwr.config import Config, ModelConfig
from fedmitr_flwr.vit.build import Weights, build_vit, initial_weights, timm_arguments, vit_of
from fedmitr_flwr.vit.names import normalisation


def config(**changes: object) -> Config:
    return settings(**{f"model.{name.replace('_', '-')}": value for name, value in changes.items()})


def model(**changes: object) -> ModelConfig:
    return config(**changes).model


def weights_file(folder: Path, **changes: object) -> tuple[Path, Weights]:
    """A file with the weights of such a model."""
    weights = {name: tensor.clone() for name, tensor in a_vit(config(**changes), seed=7).state_dict().items()}
    path = folder / "weights.safetensors"
    save_file(weights, path)
    return path, weights


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tinny_patch16_224", "'vit_tinny_patch16_224' is not a timm model; did you mean vit_tiny_patch16_224"),
        ("???", "is not a timm model; use small, or a plain ViT such as deit_tiny_patch16_224"),
        ("resnet18", "is a ResNet, no plain vision transformer; use small, or a plain ViT"),
        ("vit_tiny_patch16_224.augreg", "Invalid pretrained tag.*did you mean vit_tiny_patch16_224.augreg_in21k"),
        ("deit_tiny_distilled_patch16_224", "a VisionTransformerDistilled; use a plain ViT"),
        ("vit_small_r26_s32_224", "a HybridEmbed; use a plain ViT"),
        ("vit_small_patch16_18x2_224", "a ParallelThingsBlock; use a plain ViT"),
        ("vit_base_patch16_siglip_224", "pools by 'map'"),
    ],
)
def test_what_is_no_plain_vit_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        build_vit(model(name=name, img_size=32, patch_size=16, in_chans=3))
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "built"),
    [
        ({"width": 48, "depth": 3, "patch_size": 4, "in_chans": 3, "num_classes": 5}, (48, 3, 3)),
        ({"name": "deit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "in_chans": 3}, (192, 12, 3)),
    ],
)
def test_plain_timm_builds_the_same_network(shape: dict[str, object], built: tuple[int, int, int]) -> None:
    wanted = model(**shape)
    plain = timm.create_model(**json.loads(json.dumps(timm_arguments(wanted)))).eval()
    plain.load_state_dict(initial_weights(wanted, seed=3))
    ours = build_vit(wanted, seed=3)
    images = some_images(config(**shape), 2)
    with torch.no_grad():
        assert torch.equal(plain(images), ours(images))
    shown = resolve_model_data_config(plain)  # as timm reads it from the arguments, whose names these are
    assert shown["input_size"] == [wanted.in_chans, wanted.img_size, wanted.img_size]
    assert (shown["interpolation"], shown["crop_pct"], shown["crop_mode"]) == ("bilinear", 1.0, "squash")
    assert torch.equal(torch.tensor([shown["mean"], shown["std"]]), torch.stack(normalisation(wanted)))
    assert ours(images).shape == (2, wanted.num_classes)
    assert (ours.embed_dim, len(ours.blocks), ours.blocks[0].attn.num_heads) == built
    assert not ours.training


@pytest.mark.parametrize("name", ["small", "deit_tiny_patch16_224"])
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    wanted = model(name=name, img_size=16, patch_size=8)
    torch.manual_seed(1)
    first = initial_weights(wanted, 0)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again, other = initial_weights(wanted, 0), initial_weights(wanted, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(first) == list(again)
    assert same(first, again)
    for key in ("patch_embed.proj.weight", "pos_embed"):
        assert not torch.equal(first[key], other[key])


def test_the_small_model_keeps_signals_and_gradients_alive() -> None:
    weights = initial_weights(model(depth=4, width=64), 0)
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.weight"):
        assert weights[name].std().item() == pytest.approx(weights[name][0].numel() ** -0.5, rel=0.1)
    assert (weights["blocks.0.attn.qkv.bias"] == 0).all()
    assert weights["pos_embed"].std().item() == pytest.approx(0.2, rel=0.1)


def test_weights_serve_images_of_another_size_and_without_colour(tmp_path: Path) -> None:
    path, there = weights_file(tmp_path, img_size=16, patch_size=4, in_chans=3)
    loaded = initial_weights(model(img_size=32, patch_size=4, in_chans=1, weights=str(path)), 0)
    positions = resample_abs_pos_embed(there["pos_embed"], new_size=[8, 8], num_prefix_tokens=1)
    kernel = "patch_embed.proj.weight"
    assert loaded["pos_embed"].shape == (1, 65, 16)
    assert same(loaded, there | {"pos_embed": positions, kernel: adapt_input_conv(1, there[kernel])})
    assert torch.allclose(loaded[kernel], there[kernel].sum(1, keepdim=True), atol=1e-6)


def test_a_file_that_fits_is_loaded_whole_and_half_precision_becomes_float32(tmp_path: Path) -> None:
    """Without a head of these classes it stays as drawn."""
    path, there = weights_file(tmp_path)
    assert same(initial_weights(model(weights=str(path)), 0), there)
    save_file({key: tensor.half() for key, tensor in there.items()}, path)
    loaded = initial_weights(model(weights=str(path)), 0)
    assert same(loaded, {key: tensor.half().float() for key, tensor in there.items()})
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    fresh = {key: tensor for key, tensor in initial_weights(model(), 3).items() if key.startswith("head.")}
    path, there = weights_file(tmp_path, num_classes=7)
    for file in (there, {key: there[key] for key in there.keys() - fresh.keys()}):
        save_file(file, path)
        assert same(initial_weights(model(weights=str(path)), 3), there | fresh)


def refused(reason: str, **changes: object) -> None:
    """In one line that names the setting."""
    with pytest.raises(ModelError, match=reason) as caught:
        initial_weights(model(**changes), 0)
    assert "model.weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_tensors_is_refused_by_name(tmp_path: Path) -> None:
    shapes: dict[str, dict[str, object]] = {
        r"blocks\.0\.attn\.proj\.bias is \(32,\), not \(16,\) \(and \d+ more\)": {"width": 32},
        r"blocks\.1\..* is missing \(and \d+ more\)": {"depth": 1},
        r"blocks\.2\..* is not in the model \(and \d+ more\)": {"depth": 3},
        r"its patches are 4 x 4 px, and model\.patch-size = 2": {"patch_size": 4},
    }
    for reason, other in shapes.items():
        path, _ = weights_file(tmp_path, **other)
        refused(rf"{path}' do not fit model\.name = 'small': {reason}", weights=str(path))
    path, there = weights_file(tmp_path)
    changes: dict[str, dict[str, Tensor]] = {
        r"norm\.weight in .* has NaN or infinity": {"norm.weight": torch.tensor([math.nan])},
        r"head\.bias in .* has NaN or infinity": {"head.bias": torch.tensor([math.inf]).half()},
        r"holds 2 models": {"module.patch_embed.proj.weight": torch.ones(1)},
        r"norm\.weight has whole numbers \(int8\)": {"norm.weight": torch.ones(16, dtype=torch.int8)},
        r"student\.cls_token is not in the model": {"student.cls_token": torch.ones(1)},
        r"do not fit model\.name = 'small'": {"pos_embed": torch.ones(1, 12, 16)},
    }
    for reason, changed in changes.items():
        save_file(there | changed, path)
        refused(reason, weights=str(path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "state_dict.model.", "module.backbone."])
def test_a_wrappers_prefix_is_left_out_with_a_line(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the head has another prefix than the backbone, or there is the head of another task."""
    path, there = weights_file(tmp_path)
    heads = prefix == "module.backbone."
    renamed = {("model." if heads and name.startswith("head.") else prefix) + name: there[name] for name in there}
    save_file(renamed | ({"head_dist.weight": torch.ones(3, 16)} if heads else {}), path)
    with caplog.at_level("INFO", logger="fedmitr"):
        loaded = initial_weights(model(weights=str(path)), 0)
    assert same(loaded, there)
    assert f"begin with '{prefix}', which is left out" in caplog.text


def test_a_file_of_another_kind_is_named_and_what_the_hub_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    odd = struct.pack("<Q", 0x13C) + b"{" + b" " * 0x13A + b"}"  # begins with "<", as HTML does
    contents: dict[str, bytes | None] = {
        "there is no weights file": None,
        "is empty": b"",
        "as safetensors: .*; it may be cut off or damaged": b"no safetensors at all",
        "is a Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "is a web page": b"\n<!DOCTYPE html><html>Sign in</html>",
        "is JSON text": b'{"metadata": {}}',
        "is a PyTorch file": b"\x80\x02}q\x00.",
        "is an HDF5 file": b"\x89HDF\r\n\x1a\n",
        "holds no tensors": odd,
    }
    for reason, content in contents.items():
        if content is not None:
            path.write_bytes(content)
        refused(rf"^model\.weights: .*weights\.bin.*{reason}|{reason} .*weights\.bin", weights=str(path))
    refused("is a folder", weights=str(tmp_path))
    deit = {"name": "deit_tiny_patch16_224", "img_size": 32, "patch_size": 16, "in_chans": 3}  # without a network
    refused(r"cannot fetch .*'deit_tiny_patch16_224'.*safetensors file", weights="timm", **deit)
    refused(r"there are none for model\.name = 'small'", weights="timm")


def test_the_command_for_a_pytorch_file_converts_it(tmp_path: Path) -> None:
    _, there = weights_file(tmp_path)
    torch.save({"state_dict": {f"module.{name}": each for name, each in there.items()}, "epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="PyTorch file") as refused:
        initial_weights(model(weights=str(tmp_path / "x.pth")), 0)
    command = str(refused.value).partition("convert it once: ")[2]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=120)
    loaded = initial_weights(model(weights=str(tmp_path / "x.safetensors")), 0)
    assert same(loaded, there)


@torch.no_grad()
def test_deit_tiny_gives_timms_logits(shared: Path) -> None:
    path = shared / "weights" / "deit_tiny_patch16_224" / "model.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of deit_tiny_patch16_224 in ../shared/weights")
    sizes = {"img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000}
    full = model(name="deit_tiny_patch16_224", weights=str(path), **sizes)
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    plain.load_state_dict(load_file(path))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vit_of(full, initial_weights(full, 0))(images), plain(images))


@pytest.mark.parametrize("name", ["small", "vit_tiny_patch16_224"])
def test_a_network_around_given_weights_copies_none(name: str) -> None:
    wanted = model(name=name, img_size=32, patch_size=16, in_chans=3)
    weights = initial_weights(wanted, 3)
    around, loaded = vit_of(wanted, weights), build_vit(wanted)
    loaded.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(around(images), loaded(images))
    assert not around.training
    assert all(tensor.data_ptr() == weights[key].data_ptr() for key, tensor in around.state_dict().items())
