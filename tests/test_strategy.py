"""The ServerApp and its strategies around the real ClientApp and the real pipeline, without Ray."""

import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from local_grid import TINY, Federate, LocalGrid, Tamper, federate
from tiny import contents, timeless

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import DiskError, RunError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config, LocalConfig
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.vit.build import initial_weights
from server_app import builtin, intake
from server_app.builtin import STRATEGIES
from server_app.records import order
from server_app.strategy import OneShot

Change = Callable[[Message], list[Message] | None]  # of a reply, in place; or gives what arrives instead
AT_CLIENTS = {"evaluate.where": "clients", "evaluate.holdout": 0.3}
HALF = {"upload.dtype": "float16", "ensemble.weights": "size", "screen.mode": "off"}
SUMS, MOMENTS = {"upload.extras": "statistics"}, {"upload.extras": "variances, moments"}


def tampered(changes: Mapping[int, Change], kind: str = "train") -> Tamper:
    """Change what some clients send."""

    def tamper(reply: Message, client: int) -> list[Message]:
        instead = changes[client](reply) if client in changes and reply.metadata.message_type == kind else None
        return [reply] if instead is None else instead

    return tamper


def numbers(**changed: Any) -> Change:
    return lambda reply: reply.content["metrics"].update(changed)


def with_arrays(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(reply: Message) -> None:
        state = reply.content["arrays"].to_torch_state_dict()
        reply.content["arrays"] = ArrayRecord({name: change(tensor) for name, tensor in state.items()})

    return changed


def failed(reply: Message) -> list[Message]:
    """As the SuperLink answers for a lost node: it names itself as the source."""
    error = Message(Error(5, "node unavailable"), reply_to=reply)
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    error.metadata.__dict__["_src_node_id"] = 1
    return [error]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of three clients to which nothing happens."""
    return federate(tmp_path_factory.mktemp("plain"), LocalGrid(client_app, 3))


@pytest.mark.parametrize(
    ("method", "changes"),
    [("fedavg", AT_CLIENTS), ("fedmitr", {}), ("lda", HALF | SUMS), ("regmean", HALF | MOMENTS)],
)
def test_flower_gives_the_straight_line_s_bits(federate: Federate, tmp_path: Path, method: str, changes: Any) -> None:
    """In whatever order the replies come; nobody evaluates who was not told to, and the clients where they are."""
    grid = LocalGrid(client_app, 4, rng=random.Random(1))
    flower = federate(grid, method=method, **changes)
    arrived = re.findall(r'"stage": "upload", "client": (\d)', flower.metrics_path.read_text())
    assert sorted(arrived) == ["0", "1", "2", "3"] != arrived
    assert grid.clients_asked("evaluate") == [0, 1, 2, 3] * (changes == AT_CLIENTS)
    settings = TINY | changes | {"method": method, "partition.clients": 4, "out-dir": str(tmp_path / "line")}
    straight = pipeline.run(Config.from_flat(settings), "line")
    assert contents(flower) == contents(straight)
    ours, theirs = flower.read_result(), straight.read_result()
    assert ours["accuracy"]["student"] is not None
    keys = [
        "accuracy",
        "evaluated_on",
        "clients",
        "counts",
        "partition_sha256",
        "fingerprint",
        "bytes_up",
        "bytes_statistics",
    ]
    assert [ours.get(key) for key in keys] == [theirs.get(key) for key in keys]
    if "upload.extras" in changes:
        sent = zip(ours["bytes_statistics"], ours["bytes_down"], strict=True)
        assert ours["bytes_up"] == [statistics + bytes_down // 2 for statistics, bytes_down in sent]
        assert method != "lda" or ours["bytes_statistics"] == [4 * (10 * 192 + 192 * 193 // 2)] * 4


def test_only_what_is_missing_is_asked(federate: Federate, plain: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(client_app, 3, tamper=tampered({1: lambda _: [], 2: failed}))
    broken = federate(grid, fails="1 of 3 uploads .* missing: clients 1, 2", **{"flower.upload-timeout": 1.0})
    assert "client 1 did not reply" in caplog.text
    assert "client 2 failed: node unavailable" in caplog.text
    again = {"resume-from": str(broken.path)}
    differs = f"local.lr = 0.5, but the uploads were made with {LocalConfig().lr}"
    federate(LocalGrid(client_app, 3), fails=differs, **again, **{"local.lr": 0.5})
    federate(LocalGrid(client_app, 4), fails="num-partitions", **again)
    grid = LocalGrid(client_app, 3)
    resumed = federate(grid, **again)
    assert resumed.path == broken.path
    assert grid.clients_asked("train") == [1, 2]
    assert contents(resumed) == contents(plain)
    ended = LocalGrid(client_app, 3)
    federate(ended, fails="has ended.*fedmitr fuse", **again)
    assert not ended.asked


def test_a_server_phase_that_broke_off_is_repeated_without_the_clients(federate: Federate) -> None:
    with patch.object(pipeline, "serve", side_effect=RunError("out of memory")):
        folder = federate(LocalGrid(client_app, 3), fails="out of memory")
    grid = LocalGrid(client_app, 3)
    resumed = federate(grid, **{"resume-from": str(folder.path), "method": "ensemble"})
    assert not grid.asked
    assert resumed.finished
    assert resumed.config.method == "ensemble"  # the server phase follows the new settings, and config.toml says so


def test_a_second_upload_is_refused(federate: Federate, plain: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    def twice(reply: Message) -> list[Message]:
        second = Message(reply.content.copy(), reply_to=reply)
        second.metadata.__dict__.update(reply.metadata.__dict__)
        with_arrays(lambda tensor: 2 * tensor)(second)
        return [reply, second]

    folder = federate(LocalGrid(client_app, 3, tamper=tampered({1: twice})))
    assert contents(folder) == contents(plain)
    assert [path.name for path in folder.refused_path.iterdir()] == ["client_1.safetensors"]
    assert "client 1 has uploaded already" in caplog.text


def test_trouble_with_one_reply_does_not_cost_the_others(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is on disk is not refused because its line in the metrics cannot be written."""
    save, log, full = RunFolder.save_upload, RunFolder.log_metrics, Mock(side_effect=OSError(28, "No space left"))
    mute = Mock(side_effect=RunError("cannot write metrics.jsonl: No space left on device"))
    monkeypatch.setattr(RunFolder, "save_upload", lambda own, of: save(own, of) if of.client else full())
    monkeypatch.setattr(RunFolder, "log_metrics", lambda own, **of: mute() if of["client"] == 1 else log(own, **of))
    folder = federate(LocalGrid(client_app, 3), fails="missing: client 0")
    assert list(folder.upload_paths()) == [1, 2]
    assert not list(folder.refused_path.iterdir())
    assert "client 0: its reply could not be taken" in caplog.text
    assert "client 1: its upload is on disk, but not in the metrics" in caplog.text


class HttpGrid(LocalGrid):
    """As Flower's grid of this name, it has sent copies; `left` is what senders hold when replies are first fetched."""

    left: list[int] | None = None

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.held: list[Message] = [*getattr(self, "held", []), *messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        held = [len(message.content["arrays"]) for message in self.held if "arrays" in message.content]
        self.left = self.left or held
        return super().pull_messages(message_ids)


def test_an_upload_s_memory_is_freed_on_disk_the_start_s_when_all_have_it(federate: Federate, plain: RunFolder) -> None:
    """In a simulation the start is not freed: it is the very object that was sent."""
    replies: list[Message] = []
    grid = HttpGrid(client_app, 3, tamper=tampered(dict.fromkeys(range(3), replies.append)))
    assert contents(federate(grid)) == contents(plain)
    assert [len(reply.content["arrays"]) for reply in replies] == grid.left == [0, 0, 0]


@pytest.mark.parametrize("unable", [[1], [0, 1]])
def test_too_few_evaluations_are_a_failure(federate: Federate, unable: list[int]) -> None:
    grid = LocalGrid(client_app, 2, tamper=tampered(dict.fromkeys(unable, failed), "evaluate"))
    federate(grid, fails=f"{2 - len(unable)} clients evaluated the model, flower.quorum asks for 2", **AT_CLIENTS)


@pytest.mark.parametrize("by_position", [False, True])
def test_one_shot_is_one_round_whatever_is_asked(tmp_path: Path, by_position: bool) -> None:
    config = Config.from_flat(TINY | {"partition.clients": 2, "out-dir": str(tmp_path)})
    grid = LocalGrid(client_app, 2)
    strategy = OneShot(RunFolder.create(config, "run"), {0: grid.node(0), 1: grid.node(1)})
    given: list[Any] = [grid, ArrayRecord(dict(initial_weights(config.model, config.seed)))]
    named = {"train_config": order(config)}
    strategy.start(*given, 3, **named) if by_position else strategy.start(*given, num_rounds=3, **named)
    assert grid.clients_asked("train") == [0, 1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_flower_runs_with_the_same_client(federate: Federate, name: str) -> None:
    folder = federate(LocalGrid(client_app, 4), **{"flower.strategy": name, "flower.rounds": 2})
    result = folder.read_result()
    assert result["method"] == name
    assert 0 <= result["accuracy"]["student"] <= 100
    assert len(folder.metrics_path.read_text().splitlines()) == 2
    assert folder.model_path.exists()


def test_flowers_strategies_tell_what_they_cost(federate: Federate) -> None:
    """Two rounds of three clients, judged on validation images: each gets and sends the whole model twice."""
    judged = {"data.validation": 0.2}
    folder = federate(LocalGrid(client_app, 3), **judged, **{"flower.strategy": "fedavg", "flower.rounds": 2})
    result = folder.read_result()
    whole = 4 * sum(tensor.numel() for tensor in load_tensors(folder.model_path)[0].values())
    assert result["bytes_up"] == result["bytes_down"] == [2 * whole] * 3
    assert all(seconds > 0 for seconds in result["client_seconds"])
    assert 0 < result["server_seconds"] <= result["seconds"]["rounds"]
    assert result["server_seconds"] == result["seconds"]["aggregation"]
    assert result["peak_memory"]["ram"] > 50e6
    images = len(load(folder.config.data, folder.config.model).test)
    assert result["evaluated_on"] == {"where": "server", "split": "validation", "images": images}
    assert torch.tensor(result["confusion"]).sum() == images
    line = TINY | judged | {"partition.clients": 3, "out-dir": str(folder.path.parent)}
    straight = pipeline.run(Config.from_flat(line), "line").read_result()
    for key in ("counts", "partition_sha256"):
        assert result[key] == straight[key]
    assert set(straight) - set(result) == {"screen"}


def test_one_round_goes_to_the_weighted_mean_or_part_of_the_way(federate: Federate, plain: RunFolder) -> None:
    """Flower averages with numpy, `method = fedavg` with torch: equal up to rounding."""
    start, (mean, _) = initial_weights(plain.config.model, plain.config.seed), load_tensors(plain.model_path)
    half = "server_momentum=0, server_learning_rate=0.5"
    for name, options, step in (("fedavg", "", 1.0), ("fedavgm", half, 0.5)):
        folder = federate(LocalGrid(client_app, 3), **{"flower.strategy": name, "flower.options": options})
        for key, tensor in load_tensors(folder.model_path)[0].items():
            torch.testing.assert_close(tensor, start[key] + step * (mean[key] - start[key]), atol=1e-6, rtol=1e-5)


def test_what_is_left_to_a_strategy_is_its_own_and_0_is_0() -> None:
    def made(name: str, options: str = "") -> Any:
        return builtin._strategy(Config.from_flat({"flower.strategy": name, "flower.options": options}))

    options = ("", "proximal_mu=0", " proximal_mu = 2e0 ")
    assert [made("fedprox", each).proximal_mu for each in options] == [0.1, 0.0, 2.0]
    assert [made("fedavgm", each).server_momentum for each in ("", "server_momentum=0")] == [0.9, 0.0]


def test_flowers_strategies_need_the_quorum_too(federate: Federate) -> None:
    grid = LocalGrid(client_app, 4, tamper=tampered({1: failed, 2: numbers(**{"num-examples": 0})}))
    federate(grid, fails="2 of 4 clients replied well", **{"flower.strategy": "fedavg"})


def disguised(reply: Message) -> None:
    """A good evaluation, which nobody has asked for."""
    reply.metadata.__dict__["_message_type"] = "evaluate"
    good = {"num-examples": 5, "accuracy": 50.0, "eval_loss": 1.0, "train_loss": 1.0}
    reply.content = RecordDict({"metrics": MetricRecord(good)})


def other_order(reply: Message) -> None:
    """Which Flower's QFedAvg and others do not look at."""
    reply.content["arrays"] = ArrayRecord(dict(reversed(reply.content["arrays"].items())))


def test_flowers_strategies_leave_bad_replies_out(federate: Federate, caplog: pytest.LogCaptureFixture) -> None:
    """Clients 1 to 3 are as good as failed (what nobody can use is in test_hostile.py), and replies come in any order.

    With a number too many, Flower would give up the round.
    """
    bad = {1: numbers(train_loss=-1.0), 2: with_arrays(torch.Tensor.half), 3: disguised}
    runs = (bad | {4: numbers(extra=1), 5: other_order}, random.Random(1)), (dict.fromkeys(bad, failed), None)
    grids = [LocalGrid(client_app, 7, tamper=tampered(changes), rng=rng) for changes, rng in runs]
    folder, wanted = (federate(grid, **{"flower.strategy": "qfedavg", "flower.quorum": 0.5}) for grid in grids)
    for client, told in enumerate(("its training loss is -1.0", ".* half precision", "it sent 'metrics'"), start=1):
        assert re.search(f"refused: client {client}: {told}", caplog.text)
    assert [client for client, sent in enumerate(folder.read_result()["bytes_up"]) if not sent] == list(bad)
    assert timeless(folder.model_path) == timeless(wanted.model_path)


def test_a_strategy_that_ends_in_no_model_says_so(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exploding(FedAvg):
        def aggregate_train(self, *given: Any) -> Any:
            arrays, metrics = super().aggregate_train(*given)
            arrays["head.bias"] = Array(np.full(10, np.inf, np.float32))
            return arrays, metrics

    monkeypatch.setitem(builtin.STRATEGIES, "fedavg", (Exploding, {}))
    fails = "the model diverged: NaN or infinity in 'head.bias'; lower local.lr, or eta in flower.options"
    folder = federate(LocalGrid(client_app, 2), fails=fails, **{"flower.strategy": "fedavg"})
    assert not folder.model_path.exists()
    assert not folder.finished


def test_an_upload_that_cannot_be_written_is_held_until_it_can(
    federate: Federate, plain: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full for the first tries, past the deadline; nobody trains twice, and nothing is lost."""
    full = DiskError("cannot write x: No space left on device; make room there, and go on with resume-from")
    save, tries = RunFolder.save_upload, Mock(side_effect=[full] * 7 + [None])
    monkeypatch.setattr(RunFolder, "save_upload", lambda own, of: (of.client != 1 or tries(), save(own, of))[1])
    monkeypatch.setattr(intake, "PAUSE", 0.1)
    monkeypatch.setattr(intake, "REMIND", 0.35)
    grid = LocalGrid(client_app, 3)
    folder = federate(grid, **{"flower.upload-timeout": 0.3})
    assert tries.call_count == 8
    assert grid.clients_asked("train") == [0, 1, 2]
    assert contents(folder) == contents(plain)
    complaints = [record.message for record in caplog.records if "held in memory" in record.message]
    assert len(complaints) == 2  # not one for each try
    assert complaints[0].startswith("client 1: cannot write x: No space left on device; make room there")


# --- before and around a run

OPTIONS = "flower.options"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"local.epochz": 2}, "local.epochz"),
        ({"local.epochs": "nine"}, "local.epochs = 'nine'"),
        ({"method": "fedmagic"}, "fedmagic"),
        ({"method": "ensemble", "evaluate.where": "clients"}, "no single model"),
        ({"device": "gpu"}, "device = 'gpu'"),
        ({"model.name": "vit_nothing"}, "vit_nothing"),
        ({"model.weights": "none.safetensors"}, "none.safetensors"),
        ({"data.source": "parquet", "data.path": "/absent"}, "data.path"),
        ({"data.source": "parquet", "data.path": "/absent", "flower.strategy": "fedavg"}, "data.path"),
        ({"flower.rounds": 2}, "flower.rounds = 2"),
        ({"flower.strategy": "fedavgg"}, "flower.strategy = 'fedavgg' is unknown; use oneshot | fedavg"),
        ({"flower.strategy": "fedavg", "upload.dtype": "float16"}, "half precision"),
        ({"flower.strategy": "fedavg", "resume-from": "x"}, "resume-from needs"),
        ({OPTIONS: "eta=0.1"}, "is of a strategy that Flower ships; leave it empty"),
        ({"flower.strategy": "fedmedian", OPTIONS: "eta=0.1"}, "'fedmedian'; it has none; leave it empty"),
        ({"flower.strategy": "fedadam", OPTIONS: "eat=0.1"}, "eat is no option of flower.strategy = 'fedadam'; it has"),
        ({"flower.strategy": "fedavgm", OPTIONS: "server_momentum=1"}, "server_momentum = 1 is not possible; use 0"),
        ({"flower.strategy": "qfedavg", OPTIONS: "client_learning_rate=0"}, "use 1e-12 to inf"),
    ],
)
def test_bad_input_is_named_before_any_node_is_asked(
    federate: Federate, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str
) -> None:
    grid = LocalGrid(client_app, 2)
    assert federate(grid, fails=re.escape(told), **settings) is None  # no folder is made
    assert grid.asked == []
    assert sum(record.message.startswith("bad input: ") for record in caplog.records) == 1


def test_a_method_is_checked_with_the_clients_that_there_are(federate: Federate) -> None:
    grid = LocalGrid(client_app, 3)  # the default of partition.clients is 5
    federate(grid, fails=r"krum.hostile = 1 needs 4 uploads, not 3", method="krum")
    assert not grid.clients_asked("train")


def test_a_run_by_two_nodes_of_six_clients_and_a_relative_path(
    federate: Federate, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "flwr")
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    federate(LocalGrid(client_app, 2), **{"out-dir": "runs", "partition.clients": 6})
    os.umask(before)
    assert "partition.clients = 6 has no effect here: there are 2 clients, one for each node" in caplog.text
    assert "server_test_accuracy_student" in caplog.text
    (folder,) = (tmp_path / "runs").iterdir()
    assert f'out-dir = "{tmp_path / "runs"}"' in (folder / "config.toml").read_text()
    assert not [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o077]
