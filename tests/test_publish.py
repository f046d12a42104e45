"""A run's model in other hands: plain timm gives the same logits, and `fedmitr predict` what the evaluation saw."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from PIL.ExifTags import Base
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from tiny import a_vit, settings, some_images

from fedmitr_flwr import pipeline
from fedmitr_flwr.cli import main
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.text import parse_assignment
from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.publish.card import card
from fedmitr_flwr.publish.hub import save_model
from fedmitr_flwr.report.words import command
from fedmitr_flwr.runs.folder import RunFolder

Out = pytest.CaptureFixture[str]

SHAPES: list[dict[str, object]] = [
    {"model.width": 48, "model.depth": 3, "model.patch-size": 4, "model.in-chans": 3},
    {"model.name": "test_vit", "model.img-size": 32, "model.patch-size": 16, "model.in-chans": 1},
]


def picture(rng: np.random.Generator, light: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    return Image.fromarray(rng.integers(light, light + 120, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Dark cats and light dogs of 12 x 9 px, which are easily learnt; read only."""
    root, rng = tmp_path_factory.mktemp("publish"), np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 6)):
        for label, name in enumerate(("cat", "dog")):
            (root / "pets" / split / name).mkdir(parents=True)
            for image in range(number):
                picture(rng, 110 * label).save(root / "pets" / split / name / f"{image}.png")
    changes: dict[str, object] = {"data.source": "imagefolder", "data.path": str(root / "pets"), "model.in-chans": 3}
    changes |= {"model.num-classes": 2, "method": "fedavg", "local.epochs": 10, "local.lr": 5e-3, "out-dir": str(root)}
    return pipeline.run(settings(**changes), "run")


def lines(capsys: Out, *words: object) -> list[list[str]]:
    capsys.readouterr()
    assert main(["predict", *map(str, words)]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "timm"])
@torch.no_grad()
def test_timm_alone_gives_the_same_logits(shape: dict[str, object], tmp_path: Path) -> None:
    config = settings(**shape, **{"model.num-classes": 5, "out-dir": str(tmp_path)})
    vit, folder = a_vit(config, 3), RunFolder.create(config, "run")
    save_model(folder, vit.state_dict(), "abcde")
    images = some_images(config, 3)
    theirs = timm.create_model(f"local-dir:{folder.path}", pretrained=True).eval()
    assert torch.equal(theirs(images), vit(images))
    assert theirs.pretrained_cfg["label_names"] == list("abcde")
    other = timm.create_model(f"local-dir:{folder.path}", pretrained=True, num_classes=7, in_chans=4)  # to fine-tune
    assert torch.equal(other.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    save_for_hf(vit, str(tmp_path / "timm"), {"label_names": list("abcde")}, safe_serialization=True)
    ours, wanted = (json.loads((path / "config.json").read_text()) for path in (folder.path, tmp_path / "timm"))
    args = wanted["model_args"]
    args["img_size"] = args["img_size"][0]
    for part in ("model_args", "pretrained_cfg"):
        mine = ours.pop(part)
        assert mine == {key: wanted[part].get(key) for key in mine}
    assert ours == {key: wanted[key] for key in ours}


@pytest.mark.parametrize("shape", SHAPES, ids=["small", "timm"])
def test_timm_prepares_images_as_the_evaluation_does(shape: dict[str, object], tmp_path: Path) -> None:
    """To one of 256 levels where images are resized, which rounds them; exactly where they are not."""
    config = settings(**shape, **{"out-dir": str(tmp_path)})
    folder, side = RunFolder.create(config, "run"), config.model.img_size
    save_model(folder, a_vit(config, 3).state_dict(), [str(number) for number in range(10)])
    shown = resolve_model_data_config(timm.create_model(f"local-dir:{folder.path}"))
    transform = create_transform(**shown, is_training=False)
    for size, levels in (((side, side), 0.01), ((5 * side, 3 * side), 1.01)):
        image = picture(np.random.default_rng(1), 60, size).convert("L" if config.model.in_chans == 1 else "RGB")
        pixels = torch.from_numpy(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy())
        far = (transform(image) - prepare(pixels[None], config.model)[0]).abs().max().item()
        assert far <= levels / 255 / min(shown["std"])


def test_predictions_are_those_that_were_evaluated(run: RunFolder, capsys: Out) -> None:
    place = Path(run.config.data.path) / "test"
    found = lines(capsys, run.path, place)
    assert [name for name, *_ in found] == [str(path) for path in sorted(place.rglob("*.png"))]
    right = [Path(name).parent.name == label for name, label, _ in found]
    accuracy = run.read_result()["accuracy"]
    assert accuracy["student"] == round(100 * sum(right) / len(right), 2) > 50
    both = lines(capsys, run.path, "--top", 9, place)
    assert [row[:3] for row in both] == found
    assert all({first, second} == {"cat", "dog"} for _, first, _, second, _ in both)
    assert all(float(most) + float(least) == pytest.approx(1, abs=2e-4) for _, _, most, _, least in both)
    fused = pipeline.fuse(run, "fedmedian", {})
    assert len(lines(capsys, fused.path, place / "cat" / "0.png", place / "dog")) == 7


def test_images_are_seen_as_a_viewer_shows_them(run: RunFolder, tmp_path: Path, capsys: Out) -> None:
    image, exif = picture(np.random.default_rng(2), 80), Image.Exif()
    exif[Base.Orientation] = 6  # to be turned to the right
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    clear = image.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "c.png")
    Image.new("RGB", image.size, "white").save(tmp_path / "d.png")
    upright, turned, clear_one, white = lines(capsys, run.path, tmp_path)
    assert upright[1:] == turned[1:]
    assert clear_one[1:] == white[1:] != upright[1:]


def test_a_folder_of_0_1_0_has_the_names_in_its_result(run: RunFolder, tmp_path: Path, capsys: Out) -> None:
    old, image = tmp_path / "old", Path(run.config.data.path) / "test" / "dog" / "0.png"
    shutil.copytree(run.path, old)
    (old / "config.json").unlink()
    assert lines(capsys, old, image) == lines(capsys, run.path, image)


def test_bad_input_is_one_line(run: RunFolder, tmp_path: Path, capsys: Out) -> None:
    image, bare, mixed = Path(run.config.data.path) / "test" / "dog" / "0.png", tmp_path / "bare", tmp_path / "mixed"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for copy in (bare, mixed):
        shutil.copytree(run.path, copy)
    (bare / "model.safetensors").unlink()
    (bare / "config.json").write_text('{"label_names": ["cat"]}')
    for words, told in (
        ((run.path, image, tmp_path / "gone.png"), "gone.png: there is no such file or folder; give the path"),
        ((run.path, image, tmp_path / "text.png"), "text.png: not a readable image"),
        ((run.path, tmp_path / "empty"), "empty: no image files in this folder"),
        ((run.path, image, "--top", "0"), "--top = 0: give 1 or more"),
        ((bare, image), "bare has no model.safetensors: it has not ended"),
        ((tmp_path, image), "is not a run folder"),
        ((mixed, image), "mixed/config.json: its label_names are not 2 names"),
        ((mixed, image), "is not a model of the settings in config.toml"),
    ):
        if words[0] == mixed:
            shutil.copy((bare / "config.json") if "label_names" in told else run.path / "config.json", mixed)
        if "settings" in told:
            save_model(RunFolder.open(mixed), {"head.bias": torch.zeros(2)}, ["cat", "dog"])
        capsys.readouterr()
        assert main(["predict", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, told in err, err.count("fedmitr: error:"), err.count("\n")) == ("", True, 1, 1), err


def test_the_card_is_valid_and_its_example_runs(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    found, result = ModelCard(run.card_path.read_text()), run.read_result()
    data = found.data.to_dict()
    assert (data["library_name"], data["license"], data["metrics"]) == ("timm", "unknown", ["accuracy"])
    assert {"image-classification", "federated-learning"} <= set(data["tags"])
    (measured,) = found.data.eval_results
    assert measured.metric_value == round(result["accuracy"]["student"] / 100, 4)
    assert (measured.dataset_name, measured.dataset_split) == ("pets", "test")
    assert f"cat {result['accuracy']['per_class']['cat']:6.2f}" in found.text
    assert str(tmp_path.parents[1]) not in found.text  # where anything lies
    for name in ("model.safetensors", "config.json"):
        shutil.copy(run.path / name, tmp_path)
    shutil.copy(Path(run.config.data.path) / "test" / "dog" / "0.png", tmp_path / "image.png")
    ((_, label, chance),) = lines(capsys, run.path, tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"^```python\n(.*?)^```$", found.text, re.MULTILINE | re.DOTALL)
    exec(text, {})
    printed = capsys.readouterr().out.split()
    assert (printed[0], float(printed[1])) == (label, pytest.approx(float(chance), abs=2e-3))  # rounded when resized


def test_the_command_in_the_card_has_the_settings(run: RunFolder) -> None:
    line = command(run.read_result()["config"])
    assert f"\n    {line}\n" in run.card_path.read_text()
    program, verb, *words = shlex.split(line)
    known = Config().to_flat()
    again = Config.from_flat(dict(parse_assignment(word, known) for word in words)).to_flat()
    wanted = run.config.to_flat() | {"data.path": "pets", "out-dir": ""}
    assert ((program, verb), again) == (("fedmitr", "run"), wanted)


@pytest.mark.parametrize(
    ("changes", "central", "said"),
    [
        ({"privacy.epsilon": 3.0}, False, "differential privacy for each single image (epsilon 3)"),
        ({"flower.strategy": "fedprox", "flower.rounds": 7}, False, "from 7 rounds of fedavg among 2 clients"),
        ({}, True, "fedmitr central RUN"),
        ({"data.source": "hub", "data.path": "someone/pets"}, False, "datasets:\n- someone/pets"),
        ({"model.name": "test_vit", "model.weights": "timm"}, False, "base_model: timm/test_vit"),
        ({"flower.clients": "St. Mary | St. John"}, False, "2 clients each trained"),
    ],
)
def test_the_card_says_what_was_made(run: RunFolder, changes: dict[str, Any], central: bool, said: str) -> None:
    result = run.read_result()
    text = card(result | {"config": result["config"] | changes}, "x", central=central)
    assert said in text
    assert ModelCard(text).data.model_name == "x"
    assert "St. Mary" not in text
    assert "federated-learning" not in ModelCard(text).data.tags or not central


def test_onnx_gives_the_same_logits(run: RunFolder, tmp_path: Path, capsys: Out) -> None:
    """Of any number of images, by a runtime that shares no code with PyTorch."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path, images = tmp_path / "model.onnx", some_images(run.config, 3)
    assert main(["export", str(run.path), "--onnx", str(path)]) == 0
    assert "logits: float32 (batch, 2), of cat, dog" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path)
    for batch in (images, images[:1]):
        (logits,) = session.run(None, {"image": batch.numpy()})
        with torch.no_grad():
            wanted = timm.create_model(f"local-dir:{run.path}", pretrained=True).eval()(batch)
        torch.testing.assert_close(torch.from_numpy(logits), wanted, rtol=0, atol=1e-4)
    assert main(["export", str(run.path), "--onnx", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_onnx_needs_is_named(run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr("fedmitr_flwr.publish.export.find_spec", lambda _: None)
    assert main(["export", str(run.path), "--onnx", "model.onnx"]) == 2
    assert "pip install 'fedmitr-flwr[onnx]'" in capsys.readouterr().err
