"""The library: models of timm in memory or in files, without a run folder; and what a run has left."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import settings as tiny
from torch import Tensor, nn
from torch.testing import assert_close

import fedmitr_flwr
from fedmitr_flwr import Ensemble, Run, average, distil, fuse, invert, pipeline
from fedmitr_flwr.api import fusion
from fedmitr_flwr.api.members import members
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.errors import ConfigError, DataError, ModelError, UploadError
from fedmitr_flwr.config import Config, ModelConfig
from fedmitr_flwr.resolve import resolve
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.build import timm_arguments, vit_of
from fedmitr_flwr.vit.names import channel_statistics

FEW: dict[str, Any] = {
    "threads": 1,
    "inversion.steps": 3,
    "distill.images-per-round": 6,
    "distill.epochs-per-round": 1,
    "distill.rounds": 1,
    "relabel.mode": "tokens",
}


def vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **kwargs: Any) -> VisionTransformer:
    """A network of timm with all of its parameters drawn: fresh biases and registers would be 0."""
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "depth": 2}
    made: VisionTransformer = timm.create_model(name, **{**sizes, "num_heads": 2, **kwargs}).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return made


def shifted(model: nn.Module, by: float) -> dict[str, Tensor]:
    return {name: tensor + by for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 2.0, "reg_tokens": 2, "qkv_bias": False, "init_values": 0.5}),
        ("vit_base_patch16_clip_224", {"embed_dim": 12}),  # a norm before the blocks
        ("deit3_small_patch16_224", {}),  # no position of the class token
        ("vit_small_patch14_reg4_dinov2", {"qk_norm": True, "num_heads": 4}),
    ],
)
def test_a_network_of_timm_is_built_again_from_what_it_tells(name: str, kwargs: dict[str, Any]) -> None:
    own = vit(1, name, **kwargs)
    config, (upload,) = members([own])
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(vit_of(config, upload.weights)(images), own(images))
    by_name, _ = members([own.state_dict()], name, {"num_heads": kwargs.get("num_heads", 2)})
    again = vit_of(by_name, upload.weights)
    assert_close(again(images), own(images))


def test_pixels_are_normalised_as_the_network_says() -> None:
    config, _ = members([vit(in_chans=3)])
    assert (channel_statistics(config), "mean" in config.kwargs) == (((0.5,) * 3, (0.5,) * 3), False)
    other = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    config, _ = members([vit(in_chans=3, pretrained_cfg_overlay=other)])
    assert channel_statistics(config) == (other["mean"], other["std"])
    assert timm_arguments(config)["pretrained_cfg_overlay"]["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match=r"use mean=\(...\) \| std=\(...\), 1 decimals in each"):
        channel_statistics(ModelConfig(in_chans=1, kwargs="mean=(0.5,)"))
    with pytest.raises(ConfigError, match=r"model.kwargs = 'img_size=8' is not possible; use name=value"):
        ModelConfig(kwargs="img_size=8")


def test_what_cannot_be_fused_is_refused_by_the_models_name(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(vit(num_classes=4).state_dict(), path)
    with pytest.raises(
        ModelError, match=rf"{re.escape(str(path))}: head.bias is \(4,\), not \(3,\); give models of one"
    ):
        members([vit(), path])
    with pytest.raises(ModelError, match=r"give its name, such as model="):
        members([vit().state_dict()])
    with pytest.raises(ModelError, match=r"model 1: head.bias has NaN or infinity; leave that model out"):
        members([vit(), vit().state_dict() | {"head.bias": torch.full((3,), torch.nan)}])
    with pytest.raises(ModelError, match="does not answer as the given one"):
        members([vit(act_layer="relu")])
    with pytest.raises(ModelError, match="is or has a VisionTransformerDistilled; use a plain ViT"):
        members([timm.create_model("deit_tiny_distilled_patch16_224", depth=1)])
    with pytest.raises(ModelError, match=r"model 0: blocks\.0\.mlp\.fc1\.weight is missing"):
        members(
            [{name: tensor for name, tensor in vit().state_dict().items() if "mlp" not in name}], "vit_tiny_patch16_224"
        )
    with pytest.raises(ModelError, match=r"model 0: 'epoch' is no tensor; give the state dict alone"):
        members([{"epoch": 3, "state_dict": vit().state_dict()}], "vit_tiny_patch16_224")  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"model 0: head\.weight is missing; give a vision transformer"):
        members([vit(num_classes=0)])
    with pytest.raises(ModelError, match=r"start: head\.bias is \(4,\), not \(3,\)"):
        fuse([vit(), vit(1)], method="wudi", start=vit(num_classes=4), settings=FEW)
    with pytest.raises(ConfigError, match=r"statistics'; for models that are trained that is too late"):
        fuse([vit(), vit(1)], method="lda", settings=FEW)
    with pytest.raises(UploadError, match="sizes has 1 entries, but there are 2 models"):
        members([vit(), vit()], sizes=[3])
    with pytest.raises(UploadError, match="counts must have 3 numbers"):
        members([vit()], counts=[[1, 2]])
    with pytest.raises(ConfigError, match=r"'local.epochs' is read by no fusion of trained models"):
        Ensemble([vit(), vit()], settings={"local.epochs": 3})
    for given in ({"method": "wudi"}, {"settings": FEW | {"distill.init": "wudi"}}):
        with pytest.raises(
            ConfigError, match="'wudi' merges differences from the weights that the models were trained"
        ):
            fuse([vit(), vit(1)], **{"settings": FEW, **given})


def test_sizes_weigh_the_average_and_differences_are_of_the_start() -> None:
    first, second = vit(0), vit(1)
    mean = average([first, second], sizes=[30, 10])
    head = 0.75 * first.head.weight + 0.25 * second.head.weight
    assert_close(mean.head.weight, head)
    both = [shifted(first, 0.1), shifted(first, 0.2)]
    given = {"model": "vit_tiny_patch16_224", "kwargs": {"num_heads": 2}, "settings": FEW}
    merged = fuse(both, method="task_arithmetic", start=first, **given).student
    assert_close(merged.head.weight, first.head.weight + 0.3 * (0.1 + 0.2))  # 0.3 is the published scale


def test_a_start_that_is_known_is_the_students_as_well() -> None:
    """Fine-tuned models' bodies are merged by their differences from it; a start that was chosen stays."""
    first = vit(0)
    both = [shifted(first, 1e-3), shifted(first, 2e-3)]
    given = {"model": "vit_tiny_patch16_224", "kwargs": {"num_heads": 2}}
    for start, own, wanted in [
        (None, {}, "classwise"),
        (first, {}, "wudi"),
        (first, {"distill.init": "average"}, "average"),
    ]:
        assert fuse(both, start=start, settings=FEW | own, **given).config.distill.init == wanted


@pytest.mark.parametrize(
    ("others", "rate", "start"),
    [
        (lambda first: shifted(first, 1e-3), 1e-4, "classwise"),  # fine-tuned: near
        (lambda first: {key: value + value.roll(1) for key, value in first.state_dict().items()}, 3e-3, "average"),
        (lambda _: vit(9, init_values=None).apply(drawn).state_dict(), 3e-3, "initial"),  # drawn apart
    ],
)
def test_the_recipe_is_of_how_the_models_were_trained(others: Any, rate: float, start: str) -> None:
    first = vit(3).apply(drawn)
    given = {"model": "vit_tiny_patch16_224", "kwargs": {"num_heads": 2}}
    config = Ensemble([first.state_dict(), others(first)], **given).config
    assert (config.distill.lr, config.distill.init) == (rate, start)


def drawn(module: nn.Module) -> None:
    """Without what fresh networks have alike: ones in norms."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.normal_()


def test_a_run_s_uploads_give_the_run_s_bits_again(tmp_path: Path) -> None:
    """The same architecture by another name, and no folder: the same student, images and reports."""
    config = tiny(**{"out-dir": str(tmp_path)})
    run = Run(pipeline.run(config, "first").path)
    settings = {key: value for key, value in config.to_flat().items() if key.startswith(("ensemble.", "inversion."))}
    settings |= {key: value for key, value in config.to_flat().items() if key.startswith(("distill.", "relabel."))}
    result = fuse(
        run.uploads(),
        sizes=run.sizes,
        seed=config.seed,
        device="cpu",
        settings={**settings, "threads": 1, "data.flip": "false"},
        test=(torch.zeros(1, 1, 8, 8), torch.zeros(1)),
    )
    for name, tensor in run.model().state_dict().items():
        assert torch.equal(result.student.state_dict()[name], tensor), name
    assert result.images is not None
    assert torch.equal(result.images.images, run.images()["images"])
    curves = [[line["curve"] for line in lines if "curve" in line] for lines in (run.metrics(), result.history)]
    assert curves[0] == curves[1] != []
    assert run.result["seed"] == config.seed


def test_accuracies_are_those_of_the_test_images_and_the_saved_model_is_timm_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [vit(seed) for seed in range(3)]
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = models[0](images).argmax(-1)
    result = fuse(models, method="fedavg", settings=FEW, test=(images, labels))
    assert result.accuracy is not None
    assert result.accuracy["local"][0] == 100.0
    right = (result.student(images).argmax(-1) == labels).float().mean().item()
    assert result.accuracy["student"] == result.accuracy["fedavg"] == pytest.approx(100 * right)
    assert re.search(rf"^fedavg \(student\) +{100 * right:.2f} +\+0.00 over fedavg", result.table(), re.MULTILINE)
    saved = timm.create_model(f"local-dir:{result.save_pretrained(tmp_path / 'out')}", pretrained=True).eval()
    assert torch.equal(saved(images), result.student(images))
    sent: dict[str, Any] = {}
    monkeypatch.setattr(fusion.HfApi, "create_repo", lambda _, name, **how: sent.update(name=name, **how))

    def upload(_: object, repo_id: str, folder_path: Path) -> str:
        sent["files"] = sorted(path.name for path in folder_path.iterdir())
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(fusion.HfApi, "upload_folder", upload)
    assert result.push_to_hub("me/mine") == "https://hub/me/mine"
    assert sent == {"name": "me/mine", "private": True, "exist_ok": True, "files": ["config.json", "model.safetensors"]}
    with pytest.raises(ConfigError, match=r"there is no accuracy; give fuse\(..., test="):
        fuse(models, method="fedavg", settings=FEW).table()
    with pytest.raises(DataError, match=r"but the model takes \(1, 8, 8\); or give uint8"):
        fuse(models, method="fedavg", settings=FEW, test=(images[..., :4], labels))
    with pytest.raises(ConfigError, match="method = 'ensemble' makes no single model"):
        _ = fuse(models, method="ensemble", settings=FEW).student


def test_labels_of_patch_tokens_that_were_never_trained_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens that never meet: the class token's says one class, and each patch's the same or its opposite."""
    monkeypatch.setattr(fusion.methods, "fuse", lambda _: fusion.Fused(nn.Identity(), None))
    settings = {key: value for key, value in FEW.items() if key != "relabel.mode"}

    def mode(sign: float, **more: Any) -> str:
        model = vit(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "proj" in name or "fc2" in name or name in ("cls_token", "norm.bias", "head.bias"):
                    parameter.zero_()
            model.pos_embed[:, 1:] = sign * model.pos_embed[:, :1]
        return fuse([model, model], settings=settings | more).config.relabel.mode

    assert mode(1.0) == "tokens"
    assert "relabel.mode" not in caplog.text
    assert mode(-1.0) == "none"
    assert "relabel.mode = none: 0 % of the patch tokens agree with the class token" in caplog.text
    assert mode(-1.0, **{"relabel.mode": "tokens"}) == "tokens"  # it was asked for


def test_the_parts_are_those_of_the_whole() -> None:
    models, settings = [vit(seed) for seed in range(2)], FEW | {"ensemble.weights": "size"}
    ensemble = Ensemble(models, sizes=[3, 1], settings=settings)
    assert_close(ensemble.weights, torch.tensor([[0.75], [0.25]]).expand(2, 3))
    whole, images = fuse(models, sizes=[3, 1], settings=settings), invert(ensemble)
    assert whole.images is not None
    assert torch.equal(whole.images.images, images.images)
    own = distil(ensemble, images).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in whole.student.state_dict().items())
    from_other = distil(ensemble, images, models[1]).state_dict()
    assert not torch.equal(from_other["head.weight"], own["head.weight"])
    assert torch.equal(invert(ensemble, torch.tensor([2, 0, 2])).targets.cpu(), torch.tensor([2, 0, 2]))
    with pytest.raises(DataError, match="targets must be classes from 0 to 2"):
        invert(ensemble, torch.tensor([3]))


def test_merge_writes_what_the_library_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{seed}.safetensors") for seed in range(2)]
    for seed, file in enumerate(files):
        save_file(vit(seed).state_dict(), file)
    common = ["--model", "vit_tiny_patch16_224", "--kwargs", "num_heads=2", "--out", str(tmp_path / "out")]
    assert main(["merge", files[0], "threads=1", files[1], "--method", "fedavg", "--sizes", "3,1", *common]) == 0
    assert capsys.readouterr().out.strip().startswith(f"model: {tmp_path / 'out'}, for timm.create_model(")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_close(written["head.bias"], 0.75 * vit(0).head.bias + 0.25 * vit(1).head.bias)
    for words, line in (
        ([*files, *common], "is there already; name a new folder"),
        ([files[0], *common[:-1], str(tmp_path / "new")], "there is one file of weights; give two or more"),
        ([*files, "--sizes", "3,x", *common[:-1], str(tmp_path / "new")], "--sizes '3,x' are no whole numbers"),
    ):
        assert main(["merge", *words]) == 2
        assert line in capsys.readouterr().err


def test_the_package_says_what_it_offers() -> None:
    assert all(callable(getattr(fedmitr_flwr, name)) for name in fedmitr_flwr.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'fuze'"):
        fedmitr_flwr.fuze  # noqa: B018


def test_init_writes_what_a_run_would_have_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (90 * label, 0, 9)).save(tmp_path / "photos" / split / name / "1.png")
    file, photos = tmp_path / "photos.toml", str(tmp_path / "photos")
    assert main(["init", photos, "-o", str(file), "partition.alpha=0.1"]) == 0
    assert capsys.readouterr().out == f"{file} is written; look through it, then: fedmitr run -c {file}\n"
    assert Config.from_file(file) == resolve(Config.from_flat({"data.path": photos, "partition.alpha": 0.1}))
    assert file.read_text("utf-8").startswith("# 2 classes: cat, dog\n")
    for words, line in (([photos, "-o", str(file)], "File exists"), (["nowhere"], "there is no folder")):
        assert main(["init", *words]) == 2
        assert line in capsys.readouterr().err


def test_config_lists_settings_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> list[str]:
        assert main(["config", *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert [line.split(" = ")[0] for line in said()] == list(Config().to_flat())
    assert [line.split(" = ")[0] for line in said("partition")] == [
        key for key in Config().to_flat() if key.startswith("partition.")
    ]
    assert said("seed") == ["seed = 0"]
    assert all("halt" in line for line in said("--search", "HALT"))
    runs = [RunFolder.create(Config.from_flat({"seed": seed, "out-dir": str(tmp_path)}), str(seed)) for seed in (1, 2)]
    assert said("--diff", *(str(run.path) for run in runs)) == ["seed = 1 | 2"]
    assert main(["config", "distil"]) == 2
    assert "there is no setting or section 'distil'; " in capsys.readouterr().err
