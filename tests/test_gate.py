"""No upload enters and no model is written but through the gates; what is logged is what ran."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from tiny import settings

from fedmitr_flwr import methods, pipeline
from fedmitr_flwr.central import train_centrally
from fedmitr_flwr.cli import main
from fedmitr_flwr.common.errors import RunError, UploadError, UserError
from fedmitr_flwr.common.files import load_tensors, save_tensors
from fedmitr_flwr.common.rng import stream
from fedmitr_flwr.config import Config
from fedmitr_flwr.config.earlier import RETIRED, upgraded
from fedmitr_flwr.inversion import invert
from fedmitr_flwr.methods.contract import Job
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads import gate
from fedmitr_flwr.uploads.upload import load

OLD = Path(__file__).parent / "data" / "run-0.1.0"
SMALL = {"model.width": 16, "model.depth": 1, "inversion.steps": 4, "method": "fedavg"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Clients that send all that there is, and real images for FedDF."""
    needed = {"upload.extras": "variances, moments", "data.proxy": 0.2, "partition.clients": 4, "krum.hostile": 0}
    out = {"out-dir": str(tmp_path_factory.mktemp("runs"))}
    return pipeline.run(settings(**SMALL | needed | out), "first")


@pytest.mark.parametrize("method", methods.available())
def test_the_result_holds_the_settings_that_the_method_read(
    run: RunFolder, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method is given the logged settings and makes no others: then it can have read none but these."""
    given: list[Config] = []
    made: list[Config] = []
    module, check = methods.load(method), Config.__post_init__
    fuse: Callable[[Job], Any] = module.fuse

    def spy(job: Job) -> Any:
        given.append(job.config)
        with monkeypatch.context() as patch:
            patch.setattr(Config, "__post_init__", lambda config: (made.append(config), check(config))[1])
            return fuse(job)

    monkeypatch.setattr(module, "fuse", spy)
    folder = pipeline.fuse(run, method, {"inversion.mode": "sparse", "relabel.mode": "tokens"})
    (config,) = given
    assert made == []
    assert folder.read_result()["config"] == config.to_flat() == methods.in_force(config).to_flat()
    assert config.inversion.mode == ("dense" if method in ("adi", "dense", "coboosting") else "sparse")
    assert folder.config.inversion.mode == "sparse"  # what was asked for


@pytest.fixture
def copy(run: RunFolder, tmp_path: Path) -> RunFolder:
    """Of the run without its fusions, to be damaged."""
    return RunFolder.open(shutil.copytree(run.path, tmp_path / "run", ignore=lambda *_: ["fused"]))


LOCAL = {"local.optimizer": "sgd", "local.lr": 1e30, "local.epochs": 3}


def test_a_client_that_diverges_ends_the_run(tmp_path: Path) -> None:
    config = settings(**SMALL | LOCAL | {"out-dir": str(tmp_path), "upload.extras": "moments"})
    with pytest.raises(UploadError, match=r"^client 0: its training diverged: NaN .* in '.*'; lower local\.lr"):
        pipeline.run(config, "x")
    files = {path.name for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert files == {".lock", ".start.sha256", "config.toml"}


@pytest.mark.parametrize("method", ["fedmitr", "dense", "feddf", "central"])
def test_a_model_that_diverges_is_not_written(copy: RunFolder, method: str) -> None:
    if method == "central":
        diverging = RunFolder(copy.path, Config.from_flat(LOCAL, base=copy.config))
        with pytest.raises(RunError, match=r"the model diverged: NaN or infinity in '.*'; lower local\.lr"):
            train_centrally(diverging)
    else:
        with pytest.raises(RunError, match=r"the student diverged: NaN or infinity in '.*'; lower distill\.lr"):
            pipeline.fuse(copy, method, {"distill.lr": 1e30, "distill.epochs-per-round": 3})
    (made,) = (copy.path / "fused").iterdir()
    assert not {"model.safetensors", "result.json"} & {path.name for path in made.iterdir()}


def test_finite_weights_whose_answers_are_not_are_no_model(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload in memory is probed right after the training; where a method keeps several models, its loss is seen."""
    upload = run.load_uploads()[0]
    whole = replace(upload, weights=dict(upload.weights))
    assert gate.admit(whole, run.config) is whole
    huge = {name: torch.full_like(tensor, 1e38) for name, tensor in whole.weights.items()}
    gate.require_finite(huge, "")
    with pytest.raises(RunError, match="its answers to noise are NaN or infinity; lower x"):
        gate.require_model(huge, run.config.model, "lower x")
    with pytest.raises(UploadError, match="client 0: its model gives NaN or infinity"):
        gate.admit(replace(whole, weights=huge), run.config)
    with pytest.raises(UploadError, match="client 0: it ran other code"):
        gate.admit(whole, run.config, fingerprint="0" * 12)
    evaluate = pipeline.evaluate_on
    monkeypatch.setattr(pipeline, "evaluate_on", lambda *what: replace(evaluate(*what), loss=float("nan")))
    with pytest.raises(RunError, match=r"its loss on the evaluation's images is nan; look at the uploads"):
        pipeline.fuse(run, "ensemble", {})


def test_a_start_with_nan_leaves_no_folder(tmp_path: Path) -> None:
    start = pipeline.start_of(settings(**SMALL))
    save_tensors(tmp_path / "start.safetensors", start | {"head.bias": torch.full((10,), torch.nan)})
    config = settings(**SMALL | {"model.weights": str(tmp_path / "start.safetensors"), "out-dir": str(tmp_path / "o")})
    for begin in (pipeline.run, pipeline.start_of):  # the latter is Flower's
        with pytest.raises(UserError, match=r"model\.weights"):
            begin(config)
    assert not (tmp_path / "o").exists()


def rewritten(path: Path, **header: object) -> None:
    """Without a checksum, as by 0.1.0 or by hand."""
    tensors, own = load_tensors(path)
    weights = {name: header.pop(name, tensor) for name, tensor in tensors.items()}
    save_tensors(path, weights, own | header)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + length].replace(b"checksum", b"checksul")
    path.write_bytes(content[:8] + head + content[8 + length :])


HEAD = "head.bias"


def test_an_upload_on_disk_passes_the_gate_of_one_that_arrives(
    copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({HEAD: torch.full((10,), torch.nan)}, f"client 1: NaN or infinity in '{HEAD}'"),
        ({HEAD: torch.zeros(10, dtype=torch.float64)}, f"client 1: {HEAD} is float64; it must be float32 or float16"),
        ({"norm.weight": torch.full((16,), 3e38)}, "client 1: its model gives NaN or infinity"),
        ({"num_examples": 10**30}, "client 1: it says that it trained on 1000"),
        ({"train_loss": 10**400}, "client 1: .* is not an upload"),
        ({"class_counts": [1, "x"]}, "client 1: .* is not an upload"),
        ({"class_counts": [10**20] * 10}, "client 1: its class counts"),
        ({"client": True}, "client 1: .* is not an upload"),
    ]
    path = copy.upload_paths()[1]
    whole = path.read_bytes()
    rewritten(path)
    assert len(copy.load_uploads()) == 4
    copy.result_path.unlink()
    for changes, reason in cases:
        path.write_bytes(whole)
        rewritten(path, **changes)
        assert main(["fuse", str(copy.path), "--method", "fedavg"]) == 2
        assert re.fullmatch(rf"fedmitr: error: {reason}.*\n", capsys.readouterr().err), reason
        with pytest.raises(UserError, match=reason):
            pipeline.continued(replace(copy.config, resume_from=str(copy.path)))
        assert not (copy.path / "fused").exists()


def test_bytes_that_were_altered_are_noticed(copy: RunFolder) -> None:
    """Contents and numbers that are all possible, but not what was written."""
    path = copy.upload_paths()[2]
    content = path.read_bytes()
    count = f'\\"num_examples\\": {load(path).num_examples}'.encode()
    other = count[:-1] + b"%d" % ((count[-1] + 1) % 2)
    for altered in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(count, other)):
        path.write_bytes(altered)
        with pytest.raises(UploadError, match=r"^client 2: .*client_002\.safetensors was altered .*; delete it and"):
            copy.load_uploads()


def test_an_upload_that_may_not_be_read_is_not_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "client_000.safetensors"
    save_tensors(path, {"x": torch.ones(1)})
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(RunError, match=rf"^cannot read {path}: Permission denied; its owner can give you the permiss"):
        load(path)


def test_a_run_folder_of_0_1_0_opens_fuses_and_reports(tmp_path: Path) -> None:
    old = RunFolder.open(shutil.copytree(OLD, tmp_path / "old"))
    assert old.config.flower.options == ""  # its 0 meant the strategy's own
    asked = upgraded(old.read_result()["config"])
    assert old.config == Config.from_flat({key: value for key, value in asked.items() if key not in RETIRED})
    first, second = old.load_uploads()
    assert [first.num_examples, second.num_examples] == [79, 121]
    again = pipeline.fuse(old, "fedmitr", {})
    made, before = load_tensors(again.model_path)[0], load_tensors(old.model_path)[0]
    # Of another make of processor, training's rounding is another, and Muon amplifies it: 1e-3 was seen.
    assert all((made[name] - tensor).abs().max() < 0.02 for name, tensor in before.items())
    for name, tensor in load_tensors(pipeline.fuse(old, "fedavg", {}).model_path)[0].items():
        torch.testing.assert_close(tensor, first.weights[name].lerp(second.weights[name], 121 / 200))
    assert again.read_result()["accuracy"]["local"] == old.read_result()["accuracy"]["local"] == [9.0, 5.0]
    assert main(["report", str(old.path)]) == 0
    unread = (OLD / "config.toml").read_text().replace('data.path = ""', 'data.path = "photographs"')
    (old.path / "config.toml").write_text(unread)  # which 0.1.0 did in silence
    assert RunFolder.open(old.path).config == old.config


def test_test_settings_and_paths_decide_no_upload(run: RunFolder, tmp_path: Path) -> None:
    folder = pipeline.fuse(run, "fedavg", {"data.test-limit": 20})
    assert folder.read_result()["evaluated_on"]["images"] == 20
    here = Config.from_flat({"data.source": "parquet", "data.path": "/here"}, base=run.config)
    moved = Config.from_flat({"data.path": "/elsewhere", "model.weights": "/a.safetensors"}, base=here)
    with pytest.raises(RunError, match=r"model\.weights = '/a\.safetensors', but the uploads were made with 'none'"):
        pipeline.require_same_uploads(here, moved, "")
    pipeline.require_same_uploads(moved, Config.from_flat({"model.weights": "/b.safetensors"}, base=moved), "")
    begun = RunFolder.create(Config.from_flat({"model.weights": "/a", "out-dir": str(tmp_path)}, run.config), "x")
    start = pipeline.start_of(run.config)
    save_tensors(tmp_path / "b", start)
    save_tensors(tmp_path / "other", start | {HEAD: torch.ones(10)})
    begun.note_start(start)
    same, other = (Config.from_flat({"model.weights": str(tmp_path / name)}, begun.config) for name in ("b", "other"))
    pipeline._require_same_start(begun, same)
    with pytest.raises(RunError, match=r"/other' is not known to be what the clients started from \('/a'\)"):
        pipeline._require_same_start(begun, other)


def test_images_that_diverged_teach_no_student() -> None:
    """NaN in pixels, or a loss that never was a number, which leaves the first pixels."""
    config = settings(**SMALL | {"inversion.mode": "dense"})
    ensemble, targets = tiny.an_ensemble(config), torch.arange(3)
    for broken in ("patches", "loss"):
        made = invert.invert(ensemble, targets, config.inversion, config.model, flip=False, rng=stream(0))
        assert made.require_finite() is made
        getattr(made, broken).view(-1)[0] = torch.inf
        with pytest.raises(RunError, match=r"the synthetic images diverged: NaN .* in pixels or loss; look at the upl"):
            made.require_finite()
