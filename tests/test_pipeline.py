"""The straight line from settings to result: every file, equal bytes for equal seeds, resume, fuse, evaluation."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_layout import a_table, folders, parquet
from tiny import settings, timeless

from fedmitr_flwr import judge, pipeline
from fedmitr_flwr.common.errors import ConfigError, RunError, UserError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.config import Config
from fedmitr_flwr.data import shares, sources
from fedmitr_flwr.data.images import prepare
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.evaluation import Evaluation
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import accuracy_table
from fedmitr_flwr.uploads.upload import size
from fedmitr_flwr.vit.build import initial_weights


def a_config(folder: Path, **changes: object) -> Config:
    """Three clients."""
    return settings(**{"out-dir": str(folder), "partition.clients": 3} | changes)


def a_run(folder: Path, name: str | None = "run", **changes: object) -> RunFolder:
    return pipeline.run(a_config(folder, **changes), name)


def without_upload(folder: Path, client: int = 1, **changes: object) -> RunFolder:
    """A run that was interrupted before this client's upload."""
    run = a_run(folder, method="fedavg", **changes)
    run.upload_paths()[client].unlink()
    for path in (run.result_path, run.model_path):
        path.unlink(missing_ok=True)
    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The clients that were trained."""
    clients: list[int] = []
    train = pipeline.train_client

    def spy(config: Config, client: int, *rest: Any, **more: Any) -> Any:
        clients.append(client)
        return train(config, client, *rest, **more)

    monkeypatch.setattr(pipeline, "train_client", spy)
    return clients


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "parquet", "data.path": "/absent"}, r"data\.path"),
        ({"method": "fedsgd"}, "'fedsgd' is not one of"),
        ({"device": "gpu"}, "device = 'gpu' is not a torch device"),
        ({"model.name": "vit_nothing"}, "'vit_nothing'"),
        ({"partition.min-size": 200, "partition.clients": 2}, "need 400 images, but there are 60"),
        ({"partition.min-size": 70, "evaluate.where": "clients"}, "need 210 images, but there are 60"),
        ({"resume-from": "/absent"}, "is not a run folder"),
    ],
)
def test_what_cannot_work_leaves_no_folder_and_trains_no_client(
    tmp_path: Path, trained: list[int], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.run(a_config(tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()
    assert not trained


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A whole run by fedmitr, in which all models are of different quality; read only."""
    changes = {"local.epochs": 30, "local.lr": 3e-3, "partition.scheme": "classes-per-client"}
    changes |= {"partition.classes-per-client": 5, "upload.extras": "counts"}
    changes |= {"data.test-limit": 200, "distill.epochs-per-round": 10, "distill.lr": 3e-3}
    return a_run(tmp_path_factory.mktemp("done"), **changes)


@pytest.fixture
def averaged(tmp_path: Path) -> RunFolder:
    return a_run(tmp_path, method="fedavg")


def test_every_file_is_there(done: RunFolder) -> None:
    names = {str(path.relative_to(done.path)) for path in done.path.rglob("*") if path.is_file()}
    files = {".lock", "config.toml", "metrics.jsonl", "result.json", "images.png", "partition.png"}
    models = {"model.json", "model.safetensors", "pool.safetensors"}
    uploads = {"uploads/.start.sha256", *(f"uploads/client_{client:03}.safetensors" for client in range(3))}
    assert names == files | models | uploads
    assert Config.from_file(done.path / "config.toml") == done.config


def test_the_result_says_what_was_measured_and_what_it_cost(done: RunFolder) -> None:
    result, uploads = done.read_result(), done.load_uploads()
    assert torch.tensor(result["counts"]).sum() == 60
    assert [list(upload.class_counts) for upload in uploads] == result["counts"]
    assert result["bytes_up"] == result["bytes_down"] == [size(upload.weights) for upload in uploads]
    assert set(result["seconds"]) == {"inversion", "distillation", "evaluation"}
    assert result["synthetic_images"] == 10
    assert len(result["partition_sha256"]) == 64
    assert result["evaluated_on"] == {"where": "server", "split": "test", "images": 200}
    accuracy, confusion = result["accuracy"], torch.tensor(result["confusion"])
    assert torch.equal(confusion.sum(1), torch.bincount(load(done.config.data, done.config.model).test.labels))
    assert accuracy["student"] == round(100 * confusion.diag().sum().item() / 200, 2)
    assert accuracy["worst_class"] == min(accuracy["per_class"].values())
    assert result["client_seconds"] == [round(upload.seconds or 0, 3) for upload in uploads]
    assert all(seconds > 0 for seconds in result["client_seconds"])
    stages = sum(spent for stage, spent in result["seconds"].items() if stage != "evaluation")
    assert result["server_seconds"] >= stages - 0.01
    assert 50e6 < result["peak_memory"]["ram"] < 50e9
    assert result["peak_memory"]["gpu"] is None


def test_the_accuracies_are_those_of_the_models(done: RunFolder) -> None:
    """Evaluated here once more, by plain timm, from the files alone."""
    test = load(done.config.data, done.config.model).test
    uploads = done.load_uploads()

    def scores(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        vit = timm.create_model(**json.loads(done.model_arguments_path.read_text())).eval()
        vit.load_state_dict(weights)
        with torch.no_grad():
            return vit(prepare(test.pixels, done.config.model))

    def percent(answers: torch.Tensor) -> float:
        return pytest.approx(100 * (answers.argmax(1) == test.labels).float().mean().item(), abs=0.01)

    accuracy = done.read_result()["accuracy"]
    assert accuracy["student"] == percent(scores(load_file(done.model_path)))
    assert accuracy["fedavg"] == percent(scores(average(uploads)))
    assert accuracy["local"] == [percent(scores(upload.weights)) for upload in uploads]
    together = sum(scores(upload.weights) * upload.num_examples / 60 for upload in uploads)
    assert accuracy["ensemble"] == percent(together)
    assert len({accuracy["student"], accuracy["fedavg"], accuracy["ensemble"]}) == 3
    right = scores(load_file(done.model_path)).argmax(1) == test.labels
    for digit, recall in accuracy["per_class"].items():
        mine = right[test.labels == int(digit)]
        assert recall is None if not len(mine) else recall == pytest.approx(100 * mine.float().mean().item(), abs=0.01)


def test_the_pool_and_the_metrics(done: RunFolder) -> None:
    tensors, _ = load_tensors(done.pool_path)
    assert tensors["images"].shape == (10, 1, 8, 8)
    assert sorted(tensors["targets"].tolist()) == list(range(10))
    assert tensors["alive"].sum(1).tolist() == [7] * 10
    lines = [json.loads(line) for line in done.metrics_path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["inversion", "distillation"]


def test_uploads_are_what_train_client_gives(done: RunFolder) -> None:
    initial = initial_weights(done.config.model, done.config.seed)
    for upload in done.load_uploads():
        again = pipeline.train_client(done.config, upload.client, initial)
        assert all(torch.equal(again.weights[name], tensor) for name, tensor in upload.weights.items())
        assert (again.num_examples, again.train_loss) == (upload.num_examples, upload.train_loss)
        assert again.class_counts == upload.class_counts
        assert again.fingerprint == core()
    assert any(not torch.equal(again.weights[name], initial[name]) for name in initial)


def test_half_precision_uploads_weigh_half(tmp_path: Path, averaged: RunFolder) -> None:
    half = a_run(tmp_path, "half", method="fedavg", **{"upload.dtype": "float16"})
    whole = averaged.read_result()["bytes_up"]
    assert half.read_result()["bytes_up"] == [number // 2 for number in whole]
    assert half.read_result()["bytes_down"] == whole
    for ours, theirs in zip(half.load_uploads(), averaged.load_uploads(), strict=True):
        assert ours.class_counts is None  # which are sent by choice only
        for name, tensor in theirs.weights.items():
            assert torch.equal(ours.weights[name], tensor.half().float())


@pytest.mark.parametrize("inversion", ["sparse", "pri4"])
def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path, inversion: str) -> None:
    changes = {"inversion.mode": inversion}
    torch.manual_seed(1)
    first = a_run(tmp_path, "first", **changes)
    torch.manual_seed(2)
    again, other = a_run(tmp_path, "again", **changes), a_run(tmp_path, "other", seed=1, **changes)
    for name in ("model.safetensors", "pool.safetensors", *(f"uploads/client_00{k}.safetensors" for k in range(3))):
        bytes_of = [timeless(run.path / name) for run in (first, again, other)]
        assert bytes_of[0] == bytes_of[1], name
        assert bytes_of[0] != bytes_of[2], name
    hashes = [run.read_result()["partition_sha256"] for run in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    results = [run.read_result()["accuracy"] for run in (first, again)]
    assert results[0] == results[1]


def test_a_clients_randomness_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """The draws of a client are its own: trained first, last or alone, it gives the same bits."""
    config = a_config(tmp_path)
    initial = initial_weights(config.model, 0)
    before = {name: tensor.clone() for name, tensor in initial.items()}
    alone = pipeline.train_client(config, 2, initial)
    pipeline.train_client(config, 0, initial)
    last = pipeline.train_client(config, 2, initial)
    assert all(torch.equal(alone.weights[name], last.weights[name]) for name in initial)
    second_round = pipeline.train_client(config, 2, initial, server_round=2)
    held = pipeline.train_client(config, 2, initial, prox_mu=1.0)
    for other in (second_round, held):
        assert any(not torch.equal(alone.weights[name], other.weights[name]) for name in initial)
    assert all(torch.equal(initial[name], tensor) for name, tensor in before.items())


class Trained:
    """What train_local was given."""

    def __init__(self, vit: Any, rng: torch.Generator) -> None:
        self.weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
        self.seed, self.threads = rng.initial_seed(), torch.get_num_threads()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Trained]:
    calls: list[Trained] = []

    def spy(vit: Any, _images: Any, _config: Config, rng: torch.Generator, *_rest: Any) -> float:
        calls.append(Trained(vit, rng))
        return 0.5

    monkeypatch.setattr(pipeline, "train_local", spy)
    return calls


def test_every_client_and_round_has_its_own_stream_and_number_of_threads(tmp_path: Path, given: list[Trained]) -> None:
    config = a_config(tmp_path, **{"local.threads": 2})
    start = initial_weights(config.model, 77)
    for client in range(3):
        for server_round in (1, 2):
            upload = pipeline.train_client(config, client, start, server_round=server_round)
            for weights in (given[-1].weights, upload.weights):
                assert all(torch.equal(weights[name], tensor) for name, tensor in start.items())
    pipeline.train_client(a_config(tmp_path, seed=1), 0, start)
    assert len({call.seed for call in given}) == 7
    pipeline.train_client(config.with_clients(2), 1, start)  # the draws do not depend on how many others there are
    assert given[-1].seed == given[2].seed
    assert [call.threads for call in given] == [2] * 6 + [1, 2]
    assert torch.get_num_threads() == 1


def test_fuse_uses_the_uploads_of_a_run(done: RunFolder, trained: list[int]) -> None:
    folder = pipeline.fuse(done, "fedavg", {"krum.hostile": 7})
    assert folder.path == done.path / "fused" / "fedavg-1"
    assert folder.config == Config.from_flat({"method": "fedavg", "krum.hostile": 7}, base=done.config)
    wanted = average(done.load_uploads())
    made = load_file(folder.model_path)
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())
    result = folder.read_result()
    assert result["accuracy"]["student"] == done.read_result()["accuracy"]["fedavg"]
    assert result["method"] == "fedavg"
    assert trained == []
    assert not (folder.path / "uploads").exists()
    assert pipeline.fuse(folder, "ensemble", {}).path == done.path / "fused" / "ensemble-1"


def test_fusing_as_the_run_did_gives_its_bytes(done: RunFolder) -> None:
    folder = pipeline.fuse(done, "fedmitr", {})
    for name in ("model.safetensors", "pool.safetensors"):
        assert (folder.path / name).read_bytes() == (done.path / name).read_bytes()


OTHER_UPLOADS: dict[str, object] = {
    "seed": 1,
    "model.width": 32,
    "partition.clients": 4,
    "partition.scheme": "dirichlet",
    "local.epochs": 2,
    "data.train-limit": 50,
    "data.validation": 0.2,
    "upload.dtype": "float16",
    "evaluate.where": "clients",
}


def test_fuse_refuses_settings_that_would_change_the_uploads(done: RunFolder) -> None:
    for key, value in OTHER_UPLOADS.items():
        before = done.config.to_flat()[key]
        with pytest.raises(RunError) as refused:
            pipeline.fuse(done, "fedavg", {key: value})
        assert str(refused.value) == (
            f"{key} = {value!r}, but the uploads were made with {before!r}; to change it, make a new run"
        )


def test_fuse_takes_other_settings_of_the_server_phase(done: RunFolder) -> None:
    changes = {"inversion.mode": "dense", "relabel.mode": "none", "ensemble.combine": "probs", "distill.rounds": 2}
    result = pipeline.fuse(done, "fedmitr", changes).read_result()
    assert result["synthetic_images"] == 20
    assert changes.items() <= result["config"].items()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fedsgd", {}, "'fedsgd' is not one of"),
        ("fedavg", {"distill.lrr": 1}, r"distill\.lrr"),
        ("fedavg", {"device": "gpu"}, "device = 'gpu'"),
    ],
)
def test_a_fusion_that_cannot_work_makes_no_folder(
    done: RunFolder, method: str, changes: dict[str, object], message: str
) -> None:
    before = sorted(done.path.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        pipeline.fuse(done, method, changes)
    assert sorted(done.path.rglob("*")) == before


def test_below_the_quorum_nothing_is_fused(tmp_path: Path) -> None:
    run = without_upload(tmp_path, **{"flower.quorum": 0.7})
    with pytest.raises(RunError, match=r"2 of 3 uploads .* 3 are needed; missing: client 1"):
        pipeline.serve(run)
    with pytest.raises(RunError, match="missing: client 1"):
        pipeline.fuse(run, "fedavg", {})
    assert not run.finished
    assert not (run.path / "fused").exists()


def test_resume_asks_only_the_missing_client(tmp_path: Path, trained: list[int]) -> None:
    whole = a_run(tmp_path, "whole", method="fedavg")
    run = without_upload(tmp_path)
    trained.clear()
    resumed = pipeline.run(a_config(tmp_path, method="fedavg", **{"resume-from": str(run.path)}))
    assert resumed.path == run.path
    assert trained == [1]
    for name in ("model.safetensors", *(f"uploads/client_00{k}.safetensors" for k in range(3))):
        assert timeless(run.path / name) == timeless(whole.path / name), name
    assert resumed.read_result()["accuracy"] == whole.read_result()["accuracy"]


def test_resume_of_a_run_that_has_ended_or_with_a_name_is_refused(averaged: RunFolder, trained: list[int]) -> None:
    again = Config.from_flat({"resume-from": str(averaged.path)}, base=averaged.config)
    with pytest.raises(RunError, match=r"resume-from = .* has ended \(result\.json\); use `fedmitr fuse`"):
        pipeline.run(again)
    with pytest.raises(ConfigError, match=r"--name other is of a new run folder.*; give one of them"):
        pipeline.run(again, "other")
    assert trained == []


def test_resume_with_other_uploads_is_refused_and_with_another_method_is_fine(
    tmp_path: Path, trained: list[int]
) -> None:
    run = without_upload(tmp_path)
    trained.clear()
    back = {"resume-from": str(run.path)}
    with pytest.raises(RunError, match=r"local\.lr = 0\.5, but the uploads were made with 0\.001; resume with the"):
        pipeline.run(a_config(tmp_path, **back, **{"local.lr": 0.5}))
    assert trained == []
    resumed = pipeline.run(a_config(tmp_path, method="ensemble", **back))
    assert trained == [1]
    assert resumed.read_result()["method"] == "ensemble"
    assert RunFolder.open(run.path).config == resumed.config


@pytest.mark.parametrize("names", ["b | a | c", "a | b | c | d", "a | b", ""])
def test_resume_with_another_list_of_clients_is_refused(tmp_path: Path, trained: list[int], names: str) -> None:
    """The places in the list are the numbers under which the uploads lie."""
    run = without_upload(tmp_path, **{"flower.clients": "a | b | c"})
    trained.clear()
    back = {"method": "fedavg", "resume-from": str(run.path)}
    with pytest.raises(RunError) as caught:
        pipeline.run(a_config(tmp_path, **back, **{"flower.clients": names}))
    assert str(caught.value) == (
        f"flower.clients = {names!r}, but the run numbered its clients by 'a | b | c'; restore that list"
    )
    assert trained == []
    assert RunFolder.open(run.path).config == run.config
    pipeline.run(a_config(tmp_path, **back, **{"flower.clients": "a|b |c"}))
    assert trained == [1]


def test_a_run_whose_clients_have_not_evaluated_goes_on(tmp_path: Path, trained: list[int]) -> None:
    run = a_run(tmp_path, method="fedavg", **{"evaluate.where": "clients"})
    wanted = run.read_result()["accuracy"]["student"]
    pipeline.serve(run)  # the state between the server's phase and the clients' evaluation
    assert run.read_result()["accuracy"]["student"] is None
    trained.clear()
    resumed = pipeline.run(Config.from_flat({"resume-from": str(run.path)}, base=run.config))
    assert trained == []
    assert resumed.read_result()["accuracy"]["student"] == wanted


def test_with_a_quorum_a_gap_stays_a_gap(tmp_path: Path) -> None:
    sent = {"evaluate.where": "clients", "upload.extras": "counts"}
    for name, where in (("server", {}), ("clients", sent)):
        run = without_upload(tmp_path / name, client=1, **where, **{"flower.quorum": 0.6})
        outcome = pipeline.serve(run)
        uploads = run.load_uploads()
        assert [upload.client for upload in uploads] == [0, 2]
        assert all(torch.equal(outcome.weights[name], tensor) for name, tensor in average(uploads).items())
        by_client = [run.read_result()[key] for key in ("bytes_up", "bytes_down", "client_seconds")]
        by_client += [run.read_result()["counts"]] if where else [run.read_result()["accuracy"]["local"]]
        assert [[value is None for value in values] for values in by_client] == [[False, True, False]] * 4
    assert [list(upload.class_counts) for upload in uploads] == [by_client[-1][0], by_client[-1][2]]


@pytest.mark.parametrize("method", ["fedavg", "ensemble"])
def test_one_upload_is_average_ensemble_and_local_at_once(tmp_path: Path, method: str) -> None:
    run = without_upload(tmp_path, client=1, **{"flower.quorum": 0.3})
    run.upload_paths()[2].unlink()
    run.config = Config.from_flat({"method": method}, base=run.config)
    accuracy = pipeline.serve(run).result["accuracy"]
    assert accuracy["local"][1:] == [None, None]
    assert accuracy["student"] == accuracy["fedavg"] == accuracy["ensemble"] == accuracy["local"][0]


def test_a_method_without_one_model_writes_none(tmp_path: Path) -> None:
    run = a_run(tmp_path, None, method="ensemble")
    assert run.path.name.startswith("ensemble-0-")  # the name of a run without one
    assert not run.model_path.exists()
    assert not run.pool_path.exists()
    assert run.read_result()["accuracy"]["student"] == run.read_result()["accuracy"]["ensemble"]
    with pytest.raises(ConfigError, match=r"'ensemble' makes no single model .*; use evaluate\.where = 'server'"):
        a_run(tmp_path, method="ensemble", **{"evaluate.where": "clients"})


def test_evaluation_on_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test images of the server: the mean over the clients' held-out parts, weighted by their numbers."""
    where = {"evaluate.where": "clients", "evaluate.holdout": 0.3, "upload.extras": "counts"}
    config = a_config(tmp_path, method="fedavg", **where)
    run = pipeline.run(config, "run")
    result = run.read_result()
    weights = load_file(run.model_path)
    evaluations = [pipeline.evaluate_client(config, client, weights) for client in range(3)]
    assert [each.num_examples for each in evaluations] == [6, 6, 6]
    assert [upload.num_examples for upload in run.load_uploads()] == [14, 14, 14]
    wanted = sum(each.accuracy * each.num_examples for each in evaluations) / 18
    assert result["accuracy"]["student"] == pytest.approx(wanted, abs=0.01)
    assert result["evaluated_on"] == {"where": "clients", "images": 18}
    assert result["accuracy"]["fedavg"] is None
    assert result["accuracy"]["local"] == []
    assert result["partition_sha256"] is None  # the server does not know who holds what
    assert [sum(row) for row in result["counts"]] == [14, 14, 14]
    assert not run.partition_path.exists()
    pipeline.conclude_on_clients(run, [Evaluation(90.0, 0.1, (), 1), Evaluation(50.0, 0.1, (), 3)])
    assert run.read_result()["accuracy"]["student"] == 60.0
    shares.parts_of.cache_clear()
    monkeypatch.setattr(sources, "_load_split", None)  # the server reads no data
    assert pipeline.serve(run).result["accuracy"]["student"] is None


@pytest.mark.parametrize(("where", "read"), [("clients", {"train"}), ("server", {"train", "test"})])
def test_without_an_evaluation_on_the_server_the_test_split_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, read: set[str]
) -> None:
    seen: list[str] = []
    load_split = sources._load_split
    monkeypatch.setattr(sources, "_load_split", lambda *given: seen.append(given[-1]) or load_split(*given))
    a_run(tmp_path, method="fedavg", **{"evaluate.where": where})
    assert set(seen) == read


@pytest.mark.parametrize("left", [0, 3])
def test_a_finished_run_is_fused_without_its_training_images(
    tmp_path: Path, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The split is gone, or it has too few images for the partition: the accuracies are the same."""
    folder = parquet(tmp_path / "set")
    whole = {"data.source": "auto", "data.path": str(folder), "model.num-classes": 2, "data.train-limit": 0}
    run = a_run(tmp_path, method="fedavg", **whole, **{"partition.min-size": 1, "partition.clients": 2})
    assert run.config.data.source == "parquet"
    (folder / "train.parquet").unlink()
    if left:
        pq.write_table(a_table([0, 1, 1][: left - 2]), folder / "train.parquet")
    sources._load_split.cache_clear()
    shares.parts_of.cache_clear()
    again, before = pipeline.fuse(run, "fedavg", {}).read_result(), run.read_result()
    assert before["counts"] is not None
    assert again["counts"] is None
    assert again["accuracy"] == before["accuracy"]
    assert again["evaluated_on"] == before["evaluated_on"] == {"where": "server", "split": "test", "images": 4}
    assert "who held which images is left out of the result: " in caplog.text
    sources._load_split.cache_clear()  # no training image was looked at
    assert len(shares.server_images(run.config)[0]) == 4
    assert sources._load_split.cache_info().misses == 1


def test_names_of_any_script_come_through_to_pictures_and_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """One line for the letters that the font lacks; the page shows each name as it is, or escaped."""
    names = {"cat": "a | $x^2$<b>\x1b[31m", "dog": "高い"}
    root = folders(tmp_path / "set", number=6)
    for split in ("train", "test"):
        for name, other in names.items():
            (root / split / name).rename(root / split / other)
    own = {"data.source": "auto", "data.path": str(root), "model.num-classes": 2, "partition.clients": 2}
    run = a_run(tmp_path, **own)
    assert set(run.read_result()["accuracy"]["per_class"]) == set(names.values())
    page = write_page(run.path).read_text(encoding="utf-8")
    assert "<td>高い</td>" in page
    assert "<td>a | $x^2$&lt;b&gt;\\x1b[31m</td>" in page
    assert "\x1b" not in page + accuracy_table(run.read_result()) + caplog.text
    assert [record.message for record in caplog.records if "boxes" in record.message] == [
        "the pictures show boxes for い高, which their font lacks; tables show them"
    ]
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    assert run.images_path.exists()
    assert run.partition_path.exists()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The pixels that models were trained on, and those that they were judged by."""
    seen: dict[str, list[torch.Tensor]] = {"train": [], "judged": []}
    train, evaluate = pipeline.train_local, judge.evaluate

    def spy_train(vit: Any, images: Any, *rest: Any) -> float:
        seen["train"].append(images.pixels)
        return train(vit, images, *rest)

    def spy_evaluate(predict: Any, images: Any, *rest: Any) -> Any:
        seen["judged"].append(images.pixels)
        return evaluate(predict, images, *rest)

    monkeypatch.setattr(pipeline, "train_local", spy_train)
    monkeypatch.setattr(judge, "evaluate", spy_evaluate)
    return seen


def as_sets(*groups: torch.Tensor) -> list[set[tuple[int, ...]]]:
    return [{tuple(pixels.flatten().tolist()) for pixels in group} for group in groups]


def test_held_out_images_are_never_trained_on(tmp_path: Path, seen: dict[str, list[torch.Tensor]]) -> None:
    a_run(tmp_path, method="fedavg", **{"evaluate.where": "clients", "evaluate.holdout": 0.5})
    own, held = as_sets(torch.cat(seen["train"]), torch.cat(seen["judged"]))
    assert len(own) + len(held) == 60
    assert not own & held


def test_validation_images_are_one_set_for_all_seeds_and_no_client_s(
    tmp_path: Path, seen: dict[str, list[torch.Tensor]]
) -> None:
    changes = {"data.validation": 0.02, "data.train-limit": 0, "data.test-limit": 0, "method": "fedavg"}
    runs = [a_run(tmp_path, f"seed-{seed}", seed=seed, **changes) for seed in (0, 1)]
    judged = seen["judged"][0]
    assert all(torch.equal(judged, each) for each in seen["judged"])
    assert sum(map(len, seen["train"])) == 2 * (1437 - len(judged))
    trained, held = as_sets(torch.cat(seen["train"]), judged)
    assert not trained & held
    for run in runs:
        assert run.read_result()["evaluated_on"] == {"where": "server", "split": "validation", "images": len(judged)}


def test_a_fusion_may_do_with_less_than_was_uploaded_but_not_with_more(tmp_path: Path) -> None:
    sent = {"upload.extras": "variances"}
    rich, poor = a_run(tmp_path, "rich", method="fedavg", **sent), a_run(tmp_path, "poor", method="fedavg")
    for ours, theirs in zip(rich.load_uploads(), poor.load_uploads(), strict=True):
        assert all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
    (upload, *_) = pipeline.fuse(rich, "fedavg", {"upload.extras": ""}).load_uploads()
    assert (upload.class_counts, upload.statistics) == (None, None)
    (upload, *_) = pipeline.fuse(rich, "lda", {"upload.extras": "counts, statistics"}).load_uploads()
    assert upload.statistics is not None
    assert set(upload.statistics) == {"sums", "moment"}
    assert upload.class_counts is not None
    with pytest.raises(RunError, match=r"upload\.extras = 'statistics', but the uploads were made with ''"):
        pipeline.fuse(poor, "lda", {"upload.extras": "statistics"})


def test_a_fusion_with_a_name_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, method="fedavg")
    known = judge.lines(run.load_uploads(), run.config)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compare", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.fuse(run, "fedmitr", {}, "mine", known)
    assert list((run.path / "fused" / "mine" / "work").iterdir())
    folder = pipeline.fuse(run, "fedmitr", {}, "mine", known)
    assert folder.path == run.path / "fused" / "mine"
    assert not (folder.path / "work").exists()
    other = pipeline.fuse(run, "fedmitr", {})
    assert (folder.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()
    ours, theirs = folder.read_result(), other.read_result()
    assert ours["accuracy"] == theirs["accuracy"]
    assert (other.path / "partition.png").exists()
    assert not (folder.path / "partition.png").exists()  # one of many
