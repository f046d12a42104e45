"""Sizes, channels and classes from the model's name and the data; what contradicts them or cannot be run is refused."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import ROOT, a_vit, settings

from fedmitr_flwr import pipeline
from fedmitr_flwr.client.train import train_local
from fedmitr_flwr.common.errors import UserError
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config, ModelConfig, recipe
from fedmitr_flwr.data.images import DataSet
from fedmitr_flwr.distillation.start import start_student
from fedmitr_flwr.flower.checks import prepared
from fedmitr_flwr.resolve import patch_of, resolve
from fedmitr_flwr.vit import build
from fedmitr_flwr.vit.build import TOLERANCE, token_difference
from server_app.records import order

TIMM = "test_vit"  # timm's smallest: 160 px, patches of 16, an image size that may vary


def folder(path: Path, mode: str, *sizes: tuple[int, int], classes: int = 2, each: int = 4) -> dict[str, object]:
    """An ImageFolder of such pictures, in turn; the settings that name it."""
    rng = np.random.default_rng(0)
    for split, label, i in np.ndindex(2, classes, each):
        size = sizes[i % len(sizes)]
        place = path / ("train", "test")[split] / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.convert(mode).save(place / f"{i}.png")
    return {"data.source": "imagefolder", "data.path": str(path)}


RECIPE = ("data.flip", "local.epochs", "local.optimizer", "local.lr", "local.head-lr", "inversion.stops")
RECIPE += ("distill.init", "distill.epochs-per-round", "distill.lr")
SCRATCH = dict(zip(RECIPE, ("false", 50, "muon", 3e-3, 3e-3, "0.1,0.3", "average", 60, 3e-3), strict=True))
GIVEN = ("true", 3, "adamw", 1e-4, 1e-2, "0.0125,0.025,0.05,0.075", "wudi", 5, 1e-4)


def sizes(model: ModelConfig) -> tuple[int, int, int, int]:
    return model.img_size, model.patch_size, model.in_chans, model.num_classes


def test_digits_have_the_sizes_that_they_always_had() -> None:
    config = resolve(Config())
    assert sizes(config.model) == (8, 2, 1, 10)
    assert resolve(config) == config
    assert sizes(resolve(Config.from_flat({"model.patch-size": 4})).model) == (8, 4, 1, 10)
    by_hand = {4: 2, 8: 2, 12: 2, 16: 2, 20: 4, 28: 4, 32: 4, 33: 11, 64: 8, 96: 12, 31: 31, 1: 1}
    assert {side: patch_of(side) for side in by_hand} == by_hand


def test_own_clients_data_is_looked_at_where_the_server_has_some(tmp_path: Path) -> None:
    own: dict[str, object] = {"partition.scheme": "own"}
    at_clients, named = own | {"evaluate.where": "clients"}, {"data.classes": "class0 | class1 | other"}
    flat = folder(tmp_path, "L", (28, 28)) | own
    for given, wanted in (
        (flat, (28, 4, 1, 2)),
        (flat | named, (28, 4, 1, 3)),
        (flat | at_clients | named, (32, 4, 3, 3)),
        (at_clients, (8, 2, 1, 10)),
    ):
        assert sizes(resolve(Config.from_flat(given)).model) == wanted


def test_sizes_follow_from_the_name_and_the_data(tmp_path: Path) -> None:
    cases: list[tuple[str, list[tuple[int, int]], dict[str, object], tuple[int, ...]]] = [
        ("RGB", [(32, 32)], {}, (32, 4, 3, 2)),
        ("L", [(28, 28)], {}, (28, 4, 1, 2)),
        ("P", [(28, 28)], {}, (28, 4, 3, 2)),
        ("I;16", [(16, 16)], {}, (16, 2, 1, 2)),
        ("RGB", [(32, 24)], {}, (32, 4, 3, 2)),  # not square, of several sizes, too large, or of 1 x 1 patches only
        ("L", [(8, 8), (16, 16)], {}, (32, 4, 1, 2)),
        ("L", [(96, 96)], {}, (32, 4, 1, 2)),
        ("L", [(31, 31)], {}, (32, 4, 1, 2)),
        ("L", [(28, 28)], {"img-size": 24}, (24, 3, 1, 2)),
        ("L", [(28, 28)], {"patch-size": 7, "in-chans": 3}, (28, 7, 3, 2)),
        ("L", [(28, 28)], {"name": TIMM}, (160, 16, 3, 2)),
        ("RGB", [(28, 28)], {"name": TIMM, "img-size": 32, "in-chans": 1}, (32, 16, 1, 2)),
    ]
    for number, (mode, pictures, given, wanted) in enumerate(cases):
        flat = folder(tmp_path / str(number), "L" if mode == "I;16" else mode, *pictures)
        if mode == "I;16":
            for file in (tmp_path / str(number)).rglob("*.png"):
                Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16) * 257).save(file)
        flat |= {f"model.{key}": value for key, value in given.items()}
        assert sizes(resolve(Config.from_flat(flat)).model) == wanted


def test_contradictions_are_refused_by_naming_both(tmp_path: Path) -> None:
    vit = {"model.name": TIMM}
    for given, message in (
        (vit | {"model.patch-size": 8}, "but model.name = 'test_vit' has patches of 16"),
        (vit | {"model.width": 128}, "is of model.name = 'small', but model.name = 'test_vit' has"),
        (vit | {"model.depth": 2}, "model.depth = 2 is of model.name = 'small'"),
        (vit | {"model.img-size": 100}, "use a multiple of model.patch-size = 16"),
        ({"model.num-classes": 3}, "model.num-classes = 3, but digits has 10 classes"),
        ({"model.name": "test_vit2"}, "model.name = 'test_vit2' pools by 'avg'"),
        ({"model.name": "vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
    ):
        with pytest.raises(UserError, match=f"^.*{message}.*$"):
            pipeline.run(Config.from_flat(given | {"out-dir": str(tmp_path / "out")}))
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_otherwise_by_patches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: equal as the code is, and not where a position is wrong or something is raised."""
    model = ModelConfig(name=TIMM, img_size=32, patch_size=16, in_chans=3, num_classes=5)
    assert token_difference(model) <= TOLERANCE
    monkeypatch.setattr(build, "all_positions", lambda _: torch.zeros(1, 4, dtype=torch.int64))
    build.require_token_code.cache_clear()
    with pytest.raises(UserError, match=r"'test_vit' answers otherwise when it is run by patches \(logits differ by"):
        build.require_token_code(model)
    monkeypatch.setattr(build, "all_positions", lambda _: torch.full((1, 4), 9))
    with pytest.raises(UserError, match="'test_vit' cannot be run by patches"):
        build.require_token_code(model)


def test_the_committed_sweep_is_of_this_code() -> None:
    """Of every reason that it gives one name is tried again, and of the equal ones timm's smallest."""
    committed = json.loads((ROOT / "benchmarks/results/models/timm_vits.json").read_text())
    names, counts, refused = committed["equal"], committed["counts"], committed["refused"]
    assert (len(names), len(refused)) == (counts["equal"], counts["refused"])
    assert counts["names"] == counts["equal"] + counts["refused"]
    assert committed["largest_difference"] <= committed["tolerance"] == TOLERANCE
    assert TIMM in names
    if committed["versions"]["timm"] != timm.__version__:
        pytest.skip(f"the sweep is of timm {committed['versions']['timm']}, and {timm.__version__} is installed")
    sweep = runpy.run_path(str(ROOT / "benchmarks/timm_vits.py"))["sweep"]
    reasons = ("pools by 'avg'", "HybridEmbed", "a Eva")
    of_reasons = [next(name for name in sorted(refused, key=len) if reason in refused[name]) for reason in reasons]
    again = sweep([TIMM, *of_reasons])
    assert again["equal"] == [TIMM]
    assert again["refused"] == {name: refused[name] for name in of_reasons}


def recipe_of(**flat: object) -> tuple[object, ...]:
    known = resolve(Config.from_flat(flat)).to_flat()
    return tuple(known[key] for key in RECIPE)


def test_how_a_model_is_trained_follows_from_its_weights(tmp_path: Path) -> None:
    """From ImageNet weights: ADR 0022, 0030 to 0032. A file of weights is not looked at for it."""
    named = {"model.name": TIMM, "model.img-size": 32, "model.num-classes": 10}
    weights = {"model.weights": str(tmp_path / "none")}
    assert recipe_of() == recipe_of(**named) == tuple(SCRATCH.values())
    assert recipe_of(**weights) == recipe_of(**weights, **named) == GIVEN
    results = {
        "digits": SCRATCH | {"distill.epochs-per-round": 50},
        "cifar10_deit": dict(zip(RECIPE, GIVEN, strict=True)),
    }
    results["fashion_mnist"] = SCRATCH | {"local.epochs": 20, "data.flip": "true"}
    for name, flat in results.items():  # as they stood in these files before they were chosen by the weights
        config = Config.from_file(ROOT / "configs" / f"{name}.toml")
        assert recipe.settled(config) == Config.from_flat(flat, base=config)


@pytest.mark.parametrize("weights", ["none", "timm"])
def test_each_setting_of_a_recipe_can_be_given_by_itself(weights: str) -> None:
    """What is chosen is said in one line."""
    flip = "true" if weights == "none" else "false"
    own = dict(zip(RECIPE, (flip, 7, "sgd", 0.5, 0.25, "", "initial", 8, 0.125), strict=True))
    start = {"model.name": TIMM, "model.img-size": 32, "model.num-classes": 10, "model.weights": weights}
    chosen = dict(zip(RECIPE, recipe_of(**start), strict=True))
    for key, value in own.items():
        wanted = chosen | {key: value}
        if key == "local.lr" and weights == "none":
            wanted["local.head-lr"] = value  # which is as new as the rest
        assert dict(zip(RECIPE, recipe_of(**start, **{key: value}), strict=True)) == wanted
    assert recipe_of(**start, **own) == tuple(own.values())
    assert recipe.chosen_line(Config.from_flat(start | own)) == ""
    known = "model.weights is given: " if weights == "timm" else "training from scratch: "
    said = recipe.chosen_line(Config.from_flat(start | own | {"local.epochs": 0, "distill.lr": 0}))
    assert said == f"{known}local.epochs = {chosen['local.epochs']}, distill.lr = {chosen['distill.lr']}"


def test_nothing_trains_by_settings_that_are_left_to_be_chosen(tiny: DataSet) -> None:
    """It would be for 0 epochs, at a rate of 0."""
    config = settings(**{"model.num-classes": 3})
    of_clients = {"local.epochs": 0, "local.lr": 0, "local.head-lr": 0, "local.optimizer": "auto"}
    of_students = {"distill.init": "auto", "distill.lr": 0, "distill.epochs-per-round": 0}
    for key, value in of_clients.items():
        left = Config.from_flat({key: value}, base=config)
        with pytest.raises(AssertionError, match="to be resolved first"):
            train_local(a_vit(config, 0), tiny.train, left, stream(0), torch.device("cpu"))
    for key, value in of_students.items():
        with pytest.raises(AssertionError, match="to be resolved first"):
            start_student([], Config.from_flat({key: value}, base=config))
    with pytest.raises(AssertionError, match="to be resolved first"):
        _ = Config().inversion.stop_fractions


def test_the_server_of_flower_chooses_for_its_clients() -> None:
    """They are sent no path of the weights, and could not."""
    small = {"data.train-limit": 100, "data.test-limit": 20, "local.lr": 0.01, "device": "cpu"}
    sent = Config.from_toml(order(prepared(Config.from_flat(small)))["toml"].decode())
    assert (sent.local.epochs, sent.local.optimizer, sent.local.lr, sent.local.head_lr) == (50, "muon", 0.01, 0.01)
