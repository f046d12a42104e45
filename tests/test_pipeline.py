"""The straight line from settings to result: every file, equal bytes for equal seeds, resume, fuse, evaluation."""

import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_layout import a_table, folders, parquet
from tiny import CPU, an_upload, draw, same, settings, timeless

from fedmitr_flwr import judge, pipeline
from fedmitr_flwr.common.errors import ConfigError, RunError, UserError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config
from fedmitr_flwr.data import shares, sources
from fedmitr_flwr.data.images import DataSet, prepare
from fedmitr_flwr.ensemble.ensemble import Ensemble
from fedmitr_flwr.merging.average import average
from fedmitr_flwr.report.page import write_page
from fedmitr_flwr.runs.evaluation import Evaluation
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.runs.result import accuracy_table
from fedmitr_flwr.uploads.upload import size
from fedmitr_flwr.vit.build import initial_weights, vit_of

Log, Patch, Seen = pytest.LogCaptureFixture, pytest.MonkeyPatch, SimpleNamespace
MODELS = ("model.safetensors", "pool.safetensors")
UPLOADS = [f"uploads/client_00{client}.safetensors" for client in range(3)]


def a_config(folder: Path, **changes: object) -> Config:
    return settings(**{"out-dir": str(folder), "partition.clients": 3} | changes)


def a_run(folder: Path, name: str | None = "run", **changes: object) -> RunFolder:
    return pipeline.run(a_config(folder, **changes), name)


def without_upload(whole: RunFolder, folder: Path, client: int = 1, **changes: object) -> RunFolder:
    """A copy of a run as it was before this client's upload, with other settings of the server phase."""
    shutil.copytree(whole.path, folder, ignore=shutil.ignore_patterns("fused"))
    run = RunFolder(folder, whole.config)
    run.continue_with(Config.from_flat(changes, base=whole.config))
    for path in (run.upload_paths()[client], run.result_path, run.model_path):
        path.unlink()
    return run


def watched(folder: Path, name: str = "run", **changes: object) -> Seen:
    """A run, the pixels that its models were trained on and judged by, and the splits that it read."""
    with (
        patch.object(pipeline, "train_local", wraps=pipeline.train_local) as train,
        patch.object(judge, "evaluate", wraps=judge.evaluate) as evaluate,
        patch.object(sources, "_load_split", wraps=sources._load_split) as split,
    ):
        run = a_run(folder, name, **changes)
    pixels = [[call.args[1].pixels for call in spy.call_args_list] for spy in (train, evaluate)]
    return Seen(run=run, trained=pixels[0], judged=pixels[1], splits={call.args[-1] for call in split.call_args_list})


@pytest.fixture
def trained(monkeypatch: Patch) -> list[int]:
    clients: list[int] = []
    train = pipeline.train_client
    monkeypatch.setattr(
        pipeline, "train_client", lambda *given, **more: clients.append(given[1]) or train(*given, **more)
    )
    return clients


def test_what_cannot_work_leaves_no_folder_and_trains_no_client(tmp_path: Path, trained: list[int]) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"data.source": "parquet", "data.path": "/absent"}, r"data\.path"),
        ({"method": "fedsgd"}, "'fedsgd' is not one of"),
        ({"device": "gpu"}, "device = 'gpu' is not a torch device"),
        ({"partition.min-size": 200, "partition.clients": 2}, "need 400 images, but there are 60"),
        ({"partition.min-size": 70, "evaluate.where": "clients"}, "need 210 images, but there are 60"),
        ({"resume-from": "/absent"}, "is not a run folder"),
        ({"flower.strategy": "fedadam"}, r"flower\.strategy = 'fedadam' runs in Flower only"),
        ({"partition.scheme": "own", "data.train-limit": 0}, r"partition\.scheme = 'own' is for Flower's SuperNodes"),
    ]
    for changes, message in cases:
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


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A whole run by FedAvg; read only."""
    return watched(tmp_path_factory.mktemp("averaged"), method="fedavg")


@pytest.fixture(scope="module")
def on_clients(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The same, evaluated by the clients."""
    where = {"evaluate.where": "clients", "evaluate.holdout": 0.3, "upload.extras": "counts"}
    return watched(tmp_path_factory.mktemp("on-clients"), method="fedavg", **where)


def test_every_file_is_there_and_the_result_says_what_was_measured_and_what_it_cost(done: RunFolder) -> None:
    names = {str(path.relative_to(done.path)) for path in done.path.rglob("*") if path.is_file()}
    files = {".lock", "config.toml", "metrics.jsonl", "result.json", "images.png", "partition.png", "config.json"}
    assert names == {*files, "README.md", *MODELS, "uploads/.start.sha256", *UPLOADS}
    assert Config.from_file(done.path / "config.toml") == done.config
    tensors, _ = load_tensors(done.pool_path)
    assert tensors["images"].shape == (10, 1, 8, 8)
    assert sorted(tensors["targets"].tolist()) == list(range(10))
    assert tensors["alive"].sum(1).tolist() == [7] * 10
    lines = [json.loads(line) for line in done.metrics_path.read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["inversion", *["student"] * 10, "distillation"]
    result, uploads = done.read_result(), done.load_uploads()
    assert lines[-2]["accuracy"] == pytest.approx(result["accuracy"]["student"])  # of all 200 images
    assert sum(map(sum, result["counts"])) == 60
    assert [list(upload.class_counts) for upload in uploads] == result["counts"]
    assert result["bytes_up"] == result["bytes_down"] == [size(upload.weights) for upload in uploads]
    assert set(result["seconds"]) == {"screening", "inversion", "distillation", "evaluation"}
    weights = torch.tensor([result["teacher_weights"][str(client)] for client in range(len(uploads))])
    torch.testing.assert_close(weights.sum(0), torch.ones(10), atol=1e-3, rtol=0)
    assert (result["synthetic_images"], len(result["partition_sha256"])) == (10, 64)
    assert result["evaluated_on"] == {"where": "server", "split": "test", "images": 200}
    accuracy, confusion = result["accuracy"], torch.tensor(result["confusion"])
    assert torch.equal(confusion.sum(1), torch.bincount(sources.load(done.config.data, done.config.model).test.labels))
    assert accuracy["student"] == round(100 * confusion.diag().sum().item() / 200, 2)
    assert accuracy["worst_class"] == min(accuracy["per_class"].values())
    assert min(result["client_seconds"]) > 0
    assert result["client_seconds"] == [round(upload.seconds or 0, 3) for upload in uploads]
    stages = sum(spent for stage, spent in result["seconds"].items() if stage != "evaluation")
    assert result["server_seconds"] >= stages - 0.01
    assert 50e6 < result["peak_memory"]["ram"] < 50e9
    assert result["peak_memory"]["gpu"] is None


def test_the_accuracies_are_those_of_the_models(done: RunFolder) -> None:
    """Evaluated here once more, by plain timm, from the files alone."""
    test = sources.load(done.config.data, done.config.model).test
    uploads = done.load_uploads()

    def scores(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        vit = timm.create_model(f"local-dir:{done.path}").eval()
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


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = a_run(tmp_path, "first")
    torch.manual_seed(2)
    again, other = a_run(tmp_path, "again"), a_run(tmp_path, "other", seed=1)
    for name in (*MODELS, *UPLOADS):
        bytes_of = [timeless(run.path / name) for run in (first, again, other)]
        assert bytes_of[0] == bytes_of[1], name
        assert bytes_of[0] != bytes_of[2], name
    hashes = [run.read_result()["partition_sha256"] for run in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert first.read_result()["accuracy"] == again.read_result()["accuracy"]


def test_every_client_and_round_has_its_own_stream_and_number_of_threads(tmp_path: Path) -> None:
    config, numbers = a_config(tmp_path, **{"local.threads": 2}), []
    start = initial_weights(config.model, 77)
    spy = Mock(side_effect=lambda *_: numbers.append(torch.get_num_threads()) or 0.5)
    with patch.object(pipeline, "train_local", spy):
        for client, server_round in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)):
            upload = pipeline.train_client(config, client, start, server_round=server_round)
            assert same(upload.weights, start)
        pipeline.train_client(a_config(tmp_path, seed=1), 0, start)
        pipeline.train_client(config.with_clients(2), 1, start)  # how many others there are changes no draw
    seeds = [call.args[3].initial_seed() for call in spy.call_args_list]
    assert len(set(seeds)) == 7
    assert seeds[-1] == seeds[2]
    assert numbers == [2] * 6 + [1, 2]
    assert torch.get_num_threads() == 1


def test_fuse_uses_the_uploads_of_a_run(done: RunFolder, trained: list[int]) -> None:
    folder = pipeline.fuse(done, "fedavg", {"krum.hostile": 7})
    assert folder.path == done.path / "fused" / "fedavg-1"
    assert folder.config == Config.from_flat({"method": "fedavg", "krum.hostile": 7}, base=done.config)
    assert same(load_file(folder.model_path), average(done.load_uploads()))
    result, before = folder.read_result(), done.read_result()
    assert (result["method"], result["accuracy"]["student"]) == ("fedavg", before["accuracy"]["fedavg"])
    assert trained == []
    assert not (folder.path / "uploads").exists()
    assert pipeline.fuse(folder, "ensemble", {}).path == done.path / "fused" / "ensemble-1"


def test_fusing_as_the_run_did_gives_its_bytes(done: RunFolder) -> None:
    changes = {"inversion.mode": "pri4", "relabel.mode": "none", "ensemble.combine": "probs", "distill.rounds": 2}
    folders = [done, pipeline.fuse(done, "fedmitr", {})]
    torch.manual_seed(3)
    folders += [pipeline.fuse(done, "fedmitr", changes) for _ in range(2)]
    for name in MODELS:
        first, again, other, other_again = [(folder.path / name).read_bytes() for folder in folders]
        assert first == again != other == other_again
    result = folders[-1].read_result()
    assert result["synthetic_images"] == 2 * 3 * 4  # rounds, canvases, images on each
    assert changes.items() <= result["config"].items()


def test_a_fusion_that_cannot_work_makes_no_folder(done: RunFolder) -> None:
    before = sorted(done.path.rglob("*"))
    others = {"seed": 1, "model.width": 32, "partition.clients": 4, "partition.scheme": "dirichlet", "local.epochs": 2}
    others |= {"data.train-limit": 50, "data.validation": 0.2, "upload.dtype": "float16", "evaluate.where": "clients"}
    for key, value in others.items():
        made_with = done.config.to_flat()[key]
        with pytest.raises(RunError, match=f"^{key} = {value!r}, but .* made with {made_with!r}; to change it, make a"):
            pipeline.fuse(done, "fedavg", {key: value})
    for method, changes, message in (
        ("fedsgd", {}, "'fedsgd' is not one of"),
        ("fedavg", {"distill.lrr": 1}, r"distill\.lrr"),
        ("fedavg", {"device": "gpu"}, "device = 'gpu'"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline.fuse(done, method, changes)
    assert sorted(done.path.rglob("*")) == before


def test_resume_asks_only_the_missing_client(averaged: Seen, tmp_path: Path, trained: list[int]) -> None:
    """The draws of a client are its own: trained alone, it gives the same bits."""
    run = without_upload(averaged.run, tmp_path / "run", **{"flower.quorum": 0.7})
    with pytest.raises(RunError, match=r"2 of 3 uploads .* 3 are needed; missing: client 1"):
        pipeline.serve(run)
    with pytest.raises(RunError, match="missing: client 1"):
        pipeline.fuse(run, "fedavg", {})
    assert not run.finished
    assert not (run.path / "fused").exists()
    resumed = pipeline.run(a_config(tmp_path, method="fedavg", **{"resume-from": str(run.path)}))
    assert (resumed.path, trained) == (run.path, [1])
    for name in ("model.safetensors", *UPLOADS):
        assert timeless(run.path / name) == timeless(averaged.run.path / name), name
    assert resumed.read_result()["accuracy"] == averaged.run.read_result()["accuracy"]


def test_resume_with_another_list_of_clients_is_refused(averaged: Seen, tmp_path: Path, trained: list[int]) -> None:
    """The places in the list of clients are the numbers under which the uploads lie."""
    run = without_upload(averaged.run, tmp_path / "run", **{"flower.clients": "a | b | c"})
    back = {"method": "ensemble", "resume-from": str(run.path), "flower.clients": "a|b |c"}
    wrong = {"local.lr = 0.5, but the uploads were made with 0.001; resume with the same": {"local.lr": 0.5}}
    for names in ("b | a | c", "a | b | c | d", "a | b", ""):
        message = f"flower.clients = {names!r}, but the run numbered its clients by 'a | b | c'; restore that list"
        wrong[message] = {"flower.clients": names}
    wrong["has ended (result.json); use `fedmitr fuse`"] = {"resume-from": str(averaged.run.path)}
    for message, changes in wrong.items():
        with pytest.raises(RunError, match=re.escape(message)):
            pipeline.run(a_config(tmp_path, **back | changes))
    with pytest.raises(ConfigError, match=r"--name other is of a new run folder.*; give one of them"):
        pipeline.run(a_config(tmp_path, **back), "other")
    assert trained == []
    assert RunFolder.open(run.path).config == run.config
    resumed = pipeline.run(a_config(tmp_path, **back))
    assert (trained, resumed.read_result()["method"]) == ([1], "ensemble")
    assert RunFolder.open(run.path).config == resumed.config


def test_with_a_quorum_a_gap_stays_a_gap(averaged: Seen, on_clients: Seen, tmp_path: Path) -> None:
    for whole, key in ((averaged.run, "local"), (on_clients.run, "counts")):
        run = without_upload(whole, tmp_path / key, **{"flower.quorum": 0.6})
        outcome = pipeline.serve(run)
        uploads, result = run.load_uploads(), run.read_result()
        assert [upload.client for upload in uploads] == [0, 2]
        assert same(outcome.weights, average(uploads))
        by_client = [result[name] for name in ("bytes_up", "bytes_down", "client_seconds")]
        by_client.append((result | result["accuracy"])[key])
        assert [[value is None for value in values] for values in by_client] == [[False, True, False]] * 4
    assert [list(upload.class_counts) for upload in uploads] == [by_client[-1][0], by_client[-1][2]]


def test_a_method_without_one_model_writes_none(tmp_path: Path) -> None:
    run = a_run(tmp_path, None, method="ensemble")
    assert run.path.name.startswith("ensemble-0-")  # the name of a run without one
    assert not run.model_path.exists()
    assert not run.pool_path.exists()
    accuracy = run.read_result()["accuracy"]
    assert accuracy["student"] == accuracy["ensemble"]
    with pytest.raises(ConfigError, match=r"'ensemble' makes no single model .*; use evaluate\.where = 'server'"):
        a_run(tmp_path, method="ensemble", **{"evaluate.where": "clients"})


def as_sets(*groups: list[torch.Tensor]) -> list[set[tuple[int, ...]]]:
    return [{tuple(pixels.flatten().tolist()) for pixels in torch.cat(group)} for group in groups]


def test_evaluation_on_the_clients(averaged: Seen, on_clients: Seen, tmp_path: Path) -> None:
    """No test images of the server: the mean over the clients' held-out parts, weighted by their numbers."""
    own, held = as_sets(on_clients.trained, on_clients.judged)
    assert len(own) + len(held) == len(own | held) == 60  # what is held out is never trained on
    assert (on_clients.splits, averaged.splits) == ({"train"}, {"train", "test"})
    run = RunFolder(shutil.copytree(on_clients.run.path, tmp_path / "run"), on_clients.run.config)
    result, weights = run.read_result(), load_file(run.model_path)
    evaluations = [pipeline.evaluate_client(run.config, client, weights) for client in range(3)]
    assert [each.num_examples for each in evaluations] == [6, 6, 6]
    assert [upload.num_examples for upload in run.load_uploads()] == [14, 14, 14]
    accuracy, wanted = result["accuracy"], sum(each.accuracy for each in evaluations) / 3
    assert (accuracy["student"], accuracy["fedavg"], accuracy["local"]) == (pytest.approx(wanted, abs=0.01), None, [])
    assert result["evaluated_on"] == {"where": "clients", "images": 18}
    assert result["partition_sha256"] is None  # the server does not know who holds what
    assert [sum(row) for row in result["counts"]] == [14, 14, 14]
    assert not run.partition_path.exists()
    pipeline.conclude_on_clients(run, [Evaluation(90.0, 0.1, (), 1), Evaluation(50.0, 0.1, (), 3)])
    assert run.read_result()["accuracy"]["student"] == 60.0
    shares.parts_of.cache_clear()
    with patch.object(sources, "_load_split", None):  # the server reads no data
        assert pipeline.serve(run).result["accuracy"]["student"] is None


def test_validation_images_are_one_set_for_all_seeds_and_no_client_s(tmp_path: Path) -> None:
    changes = {"data.validation": 0.2, "data.train-limit": 200, "data.test-limit": 0, "method": "fedavg"}
    seen = [watched(tmp_path, f"seed-{seed}", seed=seed, **changes) for seed in (0, 1)]
    judged = seen[0].judged[0]
    assert all(torch.equal(judged, each) for one in seen for each in one.judged)
    for one in seen:
        trained, held = as_sets(one.trained, [judged])
        assert sum(map(len, one.trained)) == 200
        assert not trained & held
        on = {"where": "server", "split": "validation", "images": len(judged)}
        assert one.run.read_result()["evaluated_on"] == on


def test_a_finished_run_is_fused_without_its_training_images(tmp_path: Path, caplog: Log) -> None:
    """The split has too few images for the partition, or it is gone: the accuracies are the same."""
    folder = parquet(tmp_path / "set")
    whole = {"data.source": "auto", "data.path": str(folder), "model.num-classes": 2, "data.train-limit": 0}
    run = a_run(tmp_path, method="fedavg", **whole, **{"partition.min-size": 1, "partition.clients": 2})
    assert run.config.data.source == "parquet"
    before = run.read_result()
    assert before["counts"] is not None
    assert before["evaluated_on"] == {"where": "server", "split": "test", "images": 4}
    for left in (1, 0):
        (folder / "train.parquet").unlink()
        if left:
            pq.write_table(a_table([0]), folder / "train.parquet")
        sources._load_split.cache_clear()
        shares.parts_of.cache_clear()
        caplog.clear()
        again = pipeline.fuse(run, "fedavg", {}).read_result()
        assert again["counts"] is None
        assert all(again[key] == before[key] for key in ("accuracy", "evaluated_on"))
        assert "who held which images is left out of the result: " in caplog.text
    sources._load_split.cache_clear()  # no training image was looked at
    assert len(shares.server_images(run.config)[0]) == 4
    assert sources._load_split.cache_info().misses == 1


def test_names_of_any_script_come_through(tmp_path: Path, caplog: Log, recwarn: Any, monkeypatch: Patch) -> None:
    """One line for the letters that a picture's font lacks; the page shows each name as it is, or escaped."""
    draw(monkeypatch)
    names = {"cat": "a | $x^2$<b>\x1b[31m", "dog": "高い"}
    root = folders(tmp_path / "set", number=6)
    for path in [*root.glob("*/*")]:
        path.rename(path.with_name(names[path.name]))
    own = {"data.source": "auto", "data.path": str(root), "model.num-classes": 2, "partition.clients": 2}
    run = a_run(tmp_path, **own)
    result, page = run.read_result(), write_page(run.path).read_text(encoding="utf-8")
    assert set(result["accuracy"]["per_class"]) == set(names.values())
    assert "<td>高い</td>" in page
    assert "<td>a | $x^2$&lt;b&gt;\\x1b[31m</td>" in page
    assert "\x1b" not in page + accuracy_table(result) + caplog.text
    told = [record.message for record in caplog.records if "boxes" in record.message]
    assert told == ["the pictures show boxes for い高, which their font lacks; tables show them"]
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]
    assert run.images_path.exists()
    assert run.partition_path.exists()


def test_a_fusion_may_do_with_less_than_was_uploaded_but_not_with_more(averaged: Seen, tmp_path: Path) -> None:
    """More that is told does not change the weights; in half precision they are rounded and weigh half."""
    sent, poor = {"upload.extras": "variances", "upload.dtype": "float16"}, averaged.run
    rich = a_run(tmp_path, "rich", method="fedavg", **sent)
    for ours, theirs in zip(rich.load_uploads(), poor.load_uploads(), strict=True):
        assert same(ours.weights, {name: tensor.half().float() for name, tensor in theirs.weights.items()})
        assert theirs.class_counts is None  # which are sent by choice only
    less = pipeline.fuse(rich, "fedavg", {"upload.extras": ""})
    (upload, *_) = less.load_uploads()
    assert (upload.class_counts, upload.statistics) == (None, None)
    result, whole = less.read_result(), poor.read_result()["bytes_up"]
    assert (result["bytes_up"], result["bytes_down"]) == ([number // 2 for number in whole], whole)
    (upload, *_) = pipeline.fuse(rich, "lda", {"upload.extras": "counts, statistics"}).load_uploads()
    assert set(upload.statistics or ()) == {"sums", "moment"}
    assert upload.class_counts is not None
    with pytest.raises(RunError, match=r"upload\.extras = 'statistics', but the uploads were made with ''"):
        pipeline.fuse(poor, "lda", {"upload.extras": "statistics"})


@pytest.mark.parametrize(("combine", "weights"), [("logits", "uniform"), ("probs", "size")])
def test_teacher_by_teacher_it_is_the_ensemble(combine: str, weights: str, tiny: DataSet, monkeypatch: Patch) -> None:
    """With one of them in memory at a time."""
    config = settings(**{"ensemble.combine": combine, "ensemble.weights": weights})
    uploads = [an_upload(config, client, 10 + 5 * client) for client in range(5)]
    wanted = judge.evaluate_on(Ensemble.of(uploads, config.model, config.ensemble), tiny.test, config, CPU)
    built, alive = [], []

    def counted(*given: Any) -> Any:
        vit = vit_of(*given)
        built.append(weakref.ref(vit))
        alive.append(sum(each() is not None for each in built))
        return vit

    monkeypatch.setattr(judge, "vit_of", counted)
    answers = judge.answers_of(uploads, tiny.test, config, CPU)
    found = judge.together(answers, judge.weights_alone(uploads, config, CPU), tiny.test, config)
    assert (found.loss, found.confusion) == (pytest.approx(wanted.loss, rel=1e-5), wanted.confusion)
    assert alive == [1] * 5
