"""The one-shot strategy around the real ClientApp and the real pipeline, without Ray: nothing uploaded is lost."""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from local_grid import TINY, LocalGrid, Tamper, server_context, task_identity

from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import ConfigError, DiskError, RunError, UserError
from fedmitr_flwr.common.files import load_tensors
from fedmitr_flwr.config import Config, LocalConfig
from fedmitr_flwr.data.shares import client_images
from fedmitr_flwr.data.sources import load
from fedmitr_flwr.runs.folder import RunFolder
from fedmitr_flwr.uploads.upload import Upload
from fedmitr_flwr.vit.build import initial_weights
from server_app import builtin, intake
from server_app import clients as meeting
from server_app.app import app as server_app
from server_app.builtin import STRATEGIES
from server_app.records import order
from server_app.strategy import OneShot

Federate = Callable[..., RunFolder]
_RUN_IDS = itertools.count(1)


@pytest.fixture
def federate(tmp_path: Path) -> Iterator[Federate]:
    """Run the whole federation with changed settings; gives the newest run folder, also after a failure."""
    out = tmp_path / "out"

    def run(grid: LocalGrid, fails: str = "", **changes: Any) -> RunFolder:
        settings = TINY | {"out-dir": str(out)} | changes
        context = server_context(settings, next(_RUN_IDS))
        if fails:
            with pytest.raises(UserError, match=fails):
                server_app(grid, context)
        else:
            server_app(grid, context)
        return RunFolder.open(max(out.iterdir(), key=lambda path: path.stat().st_mtime))

    with task_identity():
        yield run


def only(client: int, change: Callable[[Message], list[Message]]) -> Tamper:
    """Change what one client sends."""
    return lambda reply, sender: change(reply) if sender == client else [reply]


def numbers(**changed: Any) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        reply.content["metrics"] = MetricRecord(
            dict(reply.content["metrics"]) | {key.replace("_", "-"): value for key, value in changed.items()}
        )
        return [reply]

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        state = dict(reply.content["arrays"].to_torch_state_dict())
        edit(state)
        reply.content["arrays"] = ArrayRecord(state)
        return [reply]

    return change


def without(record: str) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        del reply.content[record]
        return [reply]

    return change


def garbled(reply: Message) -> list[Message]:
    array = next(iter(reply.content["arrays"].values()))
    array.data = b"no numpy file"
    return [reply]


def doubled(reply: Message) -> list[Message]:
    reply.content["again"] = ArrayRecord({"more": torch.zeros(1)})
    return [reply]


def bits(path: Path) -> dict[str, bytes]:
    tensors, _ = load_tensors(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def all_bits(folder: RunFolder) -> list[dict[str, bytes]]:
    return [bits(path) for path in [*folder.upload_paths().values(), folder.model_path]]


@pytest.mark.parametrize("strategy", ["oneshot", "fedavg"])
def test_a_server_without_its_test_images_asks_no_client(tmp_path: Path, strategy: str) -> None:
    grid = LocalGrid(client_app, 2)
    absent = {"data.source": "parquet", "data.path": str(tmp_path / "absent"), "flower.strategy": strategy}
    with task_identity(), pytest.raises(UserError, match=r"data\.path"):
        server_app(grid, server_context(TINY | {"out-dir": str(tmp_path / "out")} | absent))
    assert not (tmp_path / "out").exists()
    assert ("train", 0) not in grid.asked
    assert ("train", 1) not in grid.asked


@pytest.mark.parametrize("method", ["fedavg", "fedmitr"])
def test_the_flower_path_gives_the_bits_of_the_straight_line(federate: Federate, tmp_path: Path, method: str) -> None:
    flower = federate(LocalGrid(client_app, 3), method=method)
    straight = pipeline.run(
        Config.from_flat(TINY | {"method": method, "partition.clients": 3, "out-dir": str(tmp_path / "line")}), "line"
    )
    assert all_bits(flower) == all_bits(straight)
    ours, theirs = flower.read_result(), straight.read_result()
    for key in ("accuracy", "clients", "counts", "partition_sha256", "fingerprint", "bytes_up"):
        assert ours[key] == theirs[key]


def test_the_order_of_the_replies_does_not_matter(federate: Federate) -> None:
    shuffled = [
        federate(LocalGrid(client_app, 4, shuffle=random.Random(seed).shuffle), method="fedmitr") for seed in range(2)
    ]
    assert all_bits(shuffled[0]) == all_bits(shuffled[1])


REFUSALS = {
    "stale code": (numbers(fingerprint=0xABC), "other code \\(000000000abc\\)"),
    "NaN": (weights(lambda state: state["head.bias"].fill_(float("nan"))), "NaN or infinity in 'head.bias'"),
    "wrong shape": (
        weights(lambda state: state.update({"head.bias": torch.zeros(3)})),
        "shape \\(3,\\), not \\(10,\\)",
    ),
    "double precision": (weights(lambda state: state.update({"head.bias": torch.zeros(10).double()})), "float64"),
    "missing key": (weights(lambda state: state.pop("head.bias")), "lack 'head.bias'"),
    "unknown key": (weights(lambda state: state.update({"extra": torch.zeros(1)})), "unknown 'extra'"),
    "no images": (numbers(num_examples=0), "0 images"),
    "ill-typed": (numbers(num_examples=[3]), "num-examples = \\[3\\]"),
    "another's name": (numbers(partition_id=0), "it is client 0's"),
    "no numbers": (without("metrics"), "it sent 'arrays' \\(ArrayRecord\\), not 'arrays'"),
    "no arrays": (without("arrays"), "it sent 'metrics' \\(MetricRecord\\), not 'arrays'"),
    "two records": (doubled, "it sent 'again' \\(ArrayRecord\\), 'arrays'"),
    "no numpy": (garbled, "its array 'cls_token' has no header"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_upload_is_refused_by_name_and_kept_and_the_others_count(
    federate: Federate, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = REFUSALS[case]
    grid = LocalGrid(client_app, 3, tamper=only(1, change))
    folder = federate(grid, fails="2 of 3 uploads .* missing: client 1; run with resume-from")
    assert list(folder.upload_paths()) == [0, 2]
    (refused,) = folder.refused_path.iterdir()
    _, header = load_tensors(refused)
    pattern = re.compile(f"client 1: .*{reason}")
    assert pattern.search(str(header["reason"]))
    assert pattern.search(caplog.text)
    assert not folder.finished


def lost(_: Message) -> list[Message]:
    return []


def failed(reply: Message) -> list[Message]:
    """As the SuperLink answers for a lost node: it names itself as the source."""
    error = Message(Error(5, "node unavailable"), reply_to=reply)
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    error.metadata.__dict__["_src_node_id"] = 1
    return [error]


@pytest.mark.parametrize("change", [lost, failed])
def test_what_is_missing_is_asked_again_and_nothing_else(
    federate: Federate, change: Callable[[Message], list[Message]], caplog: pytest.LogCaptureFixture
) -> None:
    whole = federate(LocalGrid(client_app, 3))
    wait = {"flower.upload-timeout": 3.0} if change is lost else {}
    broken = federate(LocalGrid(client_app, 3, tamper=only(2, change)), fails="missing: client 2", **wait)
    assert "client 2 " + ("did not reply" if change is lost else "failed: node unavailable") in caplog.text

    again = LocalGrid(client_app, 3)
    resumed = federate(again, **{"resume-from": str(broken.path)})
    assert resumed.path == broken.path
    assert again.clients_asked("train") == [2]
    assert all_bits(resumed) == all_bits(whole)

    ended = LocalGrid(client_app, 3)
    federate(ended, fails="has ended.*fedmitr fuse", **{"resume-from": str(broken.path)})
    assert not ended.asked


def test_a_server_phase_that_broke_off_is_repeated_without_the_clients(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: RunFolder) -> None:
        raise RunError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "serve", crash)
        folder = federate(LocalGrid(client_app, 3), fails="out of memory")
    grid = LocalGrid(client_app, 3)
    resumed = federate(grid, **{"resume-from": str(folder.path), "method": "ensemble"})
    assert not grid.asked
    assert resumed.finished
    assert resumed.config.method == "ensemble"  # the server phase follows the new settings, and config.toml says so


def test_resume_names_the_setting_that_differs(federate: Federate) -> None:
    folder = federate(LocalGrid(client_app, 3, tamper=only(2, failed)), fails="missing")
    changed = {"local.lr": 0.5, "resume-from": str(folder.path)}
    differs = f"local.lr = 0.5, but the uploads were made with {LocalConfig().lr}"
    federate(LocalGrid(client_app, 3), fails=differs, **changed)


def test_resume_with_another_number_of_clients_is_refused(federate: Federate) -> None:
    folder = federate(LocalGrid(client_app, 3, tamper=only(2, failed)), fails="missing")
    federate(LocalGrid(client_app, 4), fails="num-partitions", **{"resume-from": str(folder.path)})


def test_a_second_upload_is_refused_and_the_first_kept(federate: Federate, caplog: pytest.LogCaptureFixture) -> None:
    def twice(reply: Message) -> list[Message]:
        second = Message(reply.content.copy(), reply_to=reply)
        second.metadata.__dict__.update(reply.metadata.__dict__)
        second.content["arrays"] = ArrayRecord(
            {key: tensor + 1 for key, tensor in reply.content["arrays"].to_torch_state_dict().items()}
        )
        return [reply, second]

    folder = federate(LocalGrid(client_app, 3, tamper=only(1, twice)))
    plain = federate(LocalGrid(client_app, 3))
    assert all_bits(folder) == all_bits(plain)
    assert [path.name for path in folder.refused_path.iterdir()] == ["client_1.safetensors"]
    assert "client 1 has uploaded already" in caplog.text


def test_a_quorum_lets_the_rest_go_on(federate: Federate) -> None:
    folder = federate(LocalGrid(client_app, 3, tamper=only(1, failed)), **{"flower.quorum": 0.6})
    assert folder.finished
    assert list(folder.upload_paths()) == [0, 2]


def test_trouble_with_one_reply_does_not_cost_the_others(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = RunFolder.save_upload

    def full_disk(folder: RunFolder, upload: Any) -> Path:
        if upload.client == 0:
            raise OSError(28, "No space left on device")
        return save(folder, upload)

    monkeypatch.setattr(RunFolder, "save_upload", full_disk)
    folder = federate(LocalGrid(client_app, 3), fails="missing: client 0")
    assert list(folder.upload_paths()) == [1, 2]
    assert "client 0: its reply could not be taken" in caplog.text


def test_the_memory_of_an_upload_is_freed_when_it_is_on_disk(federate: Federate) -> None:
    replies: list[Message] = []

    def keep(reply: Message, _: int) -> list[Message]:
        replies.append(reply)
        return [reply]

    federate(LocalGrid(client_app, 3, tamper=keep))
    assert len(replies) == 3
    assert all(not len(reply.content["arrays"]) for reply in replies)


class HttpGrid(LocalGrid):
    """As Flower's grid of this name, it has sent copies; `left` is what senders hold when replies are first fetched."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.held: list[Message] = [*getattr(self, "held", []), *messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        held = [len(message.content["arrays"]) for message in self.held if "arrays" in message.content]
        self.left = getattr(self, "left", None) or held
        return super().pull_messages(message_ids)


def test_the_start_is_freed_when_everybody_has_it_but_not_in_a_simulation(federate: Federate) -> None:
    plain = federate(LocalGrid(client_app, 3))
    grid = HttpGrid(client_app, 3)
    assert all_bits(federate(grid)) == all_bits(plain)
    assert grid.left == [0, 0, 0]


def test_clients_evaluate_where_the_server_has_no_test_images(federate: Federate, tmp_path: Path) -> None:
    changes = {"evaluate.where": "clients", "evaluate.holdout": 0.3}
    grid = LocalGrid(client_app, 3)
    folder = federate(grid, **changes)
    assert grid.clients_asked("evaluate") == [0, 1, 2]
    result = folder.read_result()
    line = Config.from_flat(TINY | changes | {"partition.clients": 3, "out-dir": str(tmp_path / "line")})
    straight = pipeline.run(line, "line").read_result()
    assert result["accuracy"] == straight["accuracy"]
    assert result["accuracy"]["student"] is not None
    assert result["evaluated_on"] == straight["evaluated_on"]


def test_clients_are_not_asked_to_evaluate_otherwise(federate: Federate) -> None:
    grid = LocalGrid(client_app, 2)
    federate(grid)
    assert not grid.clients_asked("evaluate")


def test_one_evaluation_of_two_is_no_quorum(federate: Federate) -> None:
    def unable(reply: Message, client: int) -> list[Message]:
        return failed(reply) if client and reply.metadata.message_type == "evaluate" else [reply]

    changes = {"evaluate.where": "clients", "evaluate.holdout": 0.3}
    federate(LocalGrid(client_app, 2, tamper=unable), fails="1 clients evaluated the model", **changes)


def test_no_client_that_can_evaluate_is_a_failure(federate: Federate) -> None:
    def unable(reply: Message, _: int) -> list[Message]:
        return failed(reply) if reply.metadata.message_type == "evaluate" else [reply]

    changes = {"evaluate.where": "clients", "evaluate.holdout": 0.3}
    federate(
        LocalGrid(client_app, 2, tamper=unable),
        fails="0 clients evaluated the model, flower.quorum asks for 2",
        **changes,
    )


@pytest.mark.parametrize("by_position", [False, True])
def test_one_shot_is_one_round_whatever_is_asked(tmp_path: Path, by_position: bool) -> None:
    config = Config.from_flat(TINY | {"partition.clients": 2, "out-dir": str(tmp_path)})
    grid, initial = LocalGrid(client_app, 2), initial_weights(config.model, config.seed)
    strategy = OneShot(RunFolder.create(config, "run"), {0: grid.node(0), 1: grid.node(1)})
    rounds: dict[str, int] = {} if by_position else {"num_rounds": 3}
    with task_identity():
        arrays = ArrayRecord(dict(initial))
        strategy.start(grid, arrays, *([3] if by_position else []), train_config=order(config), **rounds)
    assert grid.clients_asked("train") == [0, 1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_flower_runs_with_the_same_client(federate: Federate, name: str) -> None:
    folder = federate(LocalGrid(client_app, 4), **{"flower.strategy": name, "flower.rounds": 2})
    result = folder.read_result()
    assert result["method"] == name
    assert 0 <= result["accuracy"]["student"] <= 100
    assert len(folder.metrics_path.read_text().splitlines()) == 2
    assert folder.model_path.exists()


def test_flowers_strategies_can_be_judged_on_validation_images(federate: Federate) -> None:
    folder = federate(LocalGrid(client_app, 2), **{"flower.strategy": "fedavg", "data.validation": 0.2})
    images = len(load(folder.config.data, folder.config.model).test)
    assert folder.read_result()["evaluated_on"] == {"where": "server", "split": "validation", "images": images}


def test_flowers_strategies_tell_what_they_cost(federate: Federate) -> None:
    """Two rounds of three clients: each gets and sends the whole model twice."""
    folder = federate(LocalGrid(client_app, 3), **{"flower.strategy": "fedavg", "flower.rounds": 2})
    result = folder.read_result()
    whole = 4 * sum(tensor.numel() for tensor in load_tensors(folder.model_path)[0].values())
    assert result["bytes_up"] == result["bytes_down"] == [2 * whole] * 3
    assert all(seconds > 0 for seconds in result["client_seconds"])
    assert 0 < result["server_seconds"] <= result["seconds"]["rounds"]
    assert result["server_seconds"] == result["seconds"]["aggregation"]
    assert result["peak_memory"]["ram"] > 50e6
    assert torch.tensor(result["confusion"]).sum() == result["evaluated_on"]["images"]
    assert torch.tensor(result["counts"]).sum() == 150
    straight = pipeline.run(
        Config.from_flat(TINY | {"partition.clients": 3, "out-dir": str(folder.path.parent)}), "line"
    ).read_result()
    assert result["partition_sha256"] == straight["partition_sha256"]
    assert set(straight) - set(result) == {"screen"}


def test_a_server_s_learning_rate_scales_its_step(federate: Federate) -> None:
    """FedAvgM without momentum: start + eta * (mean - start)."""
    still = {"flower.strategy": "fedavgm", "flower.options": "server_momentum=0"}
    half = federate(
        LocalGrid(client_app, 3), **still | {"flower.options": "server_momentum=0, server_learning_rate=0.5"}
    )
    whole, _ = load_tensors(federate(LocalGrid(client_app, 3), **still).model_path)
    start = initial_weights(half.config.model, half.config.seed)
    for name, tensor in load_tensors(half.model_path)[0].items():
        torch.testing.assert_close(tensor, (start[name] + whole[name]) / 2, atol=1e-6, rtol=1e-5)


def test_a_setting_that_a_strategy_does_not_have_is_refused() -> None:
    for name, options, fix in (
        ("fedmedian", "eta=0.1", "eta is no option of flower.strategy = 'fedmedian'; it has none; leave it empty"),
        (
            "fedadam",
            "eat=0.1",
            "eat is no option of flower.strategy = 'fedadam'; it has eta and tau; did you mean",
        ),
        ("fedavgm", "server_momentum=1", "server_momentum = 1 is not possible; use 0 to 0.999"),
        ("qfedavg", "client_learning_rate=0", "client_learning_rate = 0 is not possible; use 1e-12 to inf"),
        ("fedprox", "proximal_mu=-1", "proximal_mu = -1 is not possible; use 0 to inf"),
        ("oneshot", "eta=0.1", "is of a strategy that Flower ships; leave it empty"),
    ):
        context = server_context(TINY | {"flower.strategy": name, "flower.options": options}, 1)
        with pytest.raises(ConfigError, match=re.escape(fix)):
            server_app(LocalGrid(client_app, 2), context)


def test_what_is_left_to_a_strategy_is_its_own_and_0_is_0() -> None:
    def made(name: str, options: str = "") -> Any:
        return builtin._strategy(Config.from_flat({"flower.strategy": name, "flower.options": options}))

    options = ("", "proximal_mu=0", " proximal_mu = 2e0 ")
    assert [made("fedprox", each).proximal_mu for each in options] == [0.1, 0.0, 2.0]
    assert [made("fedavgm", each).server_momentum for each in ("", "server_momentum=0")] == [0.9, 0.0]


def test_one_round_of_flowers_fedavg_is_the_weighted_mean(federate: Federate) -> None:
    """Flower averages with numpy, `method = fedavg` with torch: equal up to rounding."""
    flower = federate(LocalGrid(client_app, 3), **{"flower.strategy": "fedavg"})
    ours = federate(LocalGrid(client_app, 3))
    theirs, _ = load_tensors(flower.model_path)
    for key, tensor in load_tensors(ours.model_path)[0].items():
        torch.testing.assert_close(theirs[key], tensor, atol=1e-6, rtol=1e-5)


def test_flowers_strategies_are_deterministic_too(federate: Federate) -> None:
    def run(seed: int) -> dict[str, bytes]:
        grid = LocalGrid(client_app, 4, shuffle=random.Random(seed).shuffle)
        return bits(federate(grid, **{"flower.strategy": "fedavg", "flower.rounds": 2}).model_path)

    assert run(1) == run(2)


def test_flowers_strategies_can_evaluate_at_the_clients(federate: Federate) -> None:
    grid = LocalGrid(client_app, 3)
    folder = federate(grid, **{"flower.strategy": "fedavg", "evaluate.where": "clients", "evaluate.holdout": 0.3})
    assert grid.clients_asked("evaluate") == [0, 1, 2]
    result = folder.read_result()
    assert 0 <= result["accuracy"]["student"] <= 100
    held = sum(client_images(folder.config, client)[1].labels.numel() for client in range(3))
    assert result["evaluated_on"] == {"where": "clients", "images": held}


def test_flowers_strategies_need_the_quorum_too(federate: Federate) -> None:
    grid = LocalGrid(client_app, 3, tamper=only(1, failed))
    federate(grid, fails="2 of 3 clients replied well", **{"flower.strategy": "fedavg"})


def of_torch(reply: Message) -> list[Message]:
    """Flower's strategies would ask numpy to read it."""
    array = reply.content["arrays"]["head.bias"]
    reply.content["arrays"]["head.bias"] = Array(array.dtype, array.shape, "torch.Tensor", b"pickled")
    return [reply]


def disguised(reply: Message) -> list[Message]:
    """A good evaluation, which nobody has asked for."""
    reply.metadata.__dict__["_message_type"] = "evaluate"
    reply.content = RecordDict(
        {"metrics": MetricRecord({"num-examples": 5, "accuracy": 50.0, "eval_loss": 1.0, "train_loss": 1.0})}
    )
    return [reply]


def halved(reply: Message) -> list[Message]:
    return weights(lambda state: state.update({key: tensor.half() for key, tensor in state.items()}))(reply)


BAD_REPLIES: dict[str, Callable[[Message], list[Message]]] = {
    **{name: REFUSALS[name][0] for name in REFUSALS if name != "another's name"},
    "absurd size": numbers(num_examples=10**12),
    "infinite loss": lambda reply: [set_loss(reply, float("inf"))],
    "impossible loss": lambda reply: [set_loss(reply, -1.0)],
    "overflow": weights(lambda state: state.update({key: tensor * 1e30 for key, tensor in state.items()})),
    "of torch": of_torch,
    "disguised": disguised,
    "half precision": halved,
}


def set_loss(reply: Message, loss: float) -> Message:
    reply.content["metrics"] = MetricRecord(dict(reply.content["metrics"]) | {"train_loss": loss})
    return reply


@pytest.fixture(scope="module")
def without_client_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model of Flower's FedAvg where client 1 of 3 fails."""
    out = tmp_path_factory.mktemp("without")
    with task_identity():
        server_app(LocalGrid(client_app, 3, tamper=only(1, failed)), server_context(flowers(out)))
    return bits(RunFolder.open(next(out.iterdir())).model_path)


def flowers(out: Path) -> dict[str, Any]:
    return TINY | {"out-dir": str(out), "flower.strategy": "fedavg", "flower.quorum": 0.6}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_flowers_strategies_leave_a_bad_reply_out(
    federate: Federate, without_client_1: dict[str, bytes], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = LocalGrid(client_app, 3, tamper=only(1, BAD_REPLIES[name]))
    folder = federate(grid, **{"flower.strategy": "fedavg", "flower.quorum": 0.6})
    assert bits(folder.model_path) == without_client_1
    assert "refused: client 1: " in caplog.text
    assert folder.read_result()["bytes_up"][1] == 0


def test_a_bad_reply_does_not_count_for_the_quorum(federate: Federate) -> None:
    grid = LocalGrid(client_app, 3, tamper=only(1, numbers(num_examples=0)))
    federate(grid, fails="2 of 3 clients replied well", **{"flower.strategy": "fedavg"})


def more_numbers(reply: Message) -> list[Message]:
    """For which Flower gives up the round."""
    return numbers(extra=1)(reply)


def other_order(reply: Message) -> list[Message]:
    """Which Flower's QFedAvg and others do not look at."""
    reply.content["arrays"] = ArrayRecord(dict(reversed(reply.content["arrays"].items())))
    return [reply]


@pytest.mark.parametrize("change", [more_numbers, other_order])
def test_what_is_odd_and_harmless_changes_nothing(
    federate: Federate, change: Callable[[Message], list[Message]]
) -> None:
    still = {"flower.strategy": "qfedavg"}
    plain = federate(LocalGrid(client_app, 3), **still)
    odd = federate(LocalGrid(client_app, 3, tamper=only(1, change)), **still)
    assert bits(odd.model_path) == bits(plain.model_path)


def test_flowers_strategies_leave_a_bad_evaluation_out(federate: Federate, caplog: pytest.LogCaptureFixture) -> None:
    def lie(reply: Message, client: int) -> list[Message]:
        if reply.metadata.message_type == "evaluate" and client == 1:
            reply.content["metrics"] = MetricRecord(dict(reply.content["metrics"]) | {"accuracy": float("nan")})
        return [reply]

    changes = {"flower.strategy": "fedavg", "flower.quorum": 0.6, "evaluate.where": "clients", "evaluate.holdout": 0.3}
    folder = federate(LocalGrid(client_app, 3, tamper=lie), **changes)
    assert "refused: client 1: its evaluation is nan %" in caplog.text
    model, _ = load_tensors(folder.model_path)
    good = [pipeline.evaluate_client(folder.config, client, model) for client in (0, 2)]
    images = sum(each.num_examples for each in good)
    expected = sum(each.accuracy * each.num_examples for each in good) / images
    assert folder.read_result()["accuracy"]["student"] == pytest.approx(expected, abs=0.005)
    assert folder.read_result()["evaluated_on"]["images"] == images


def test_a_strategy_that_ends_in_no_model_says_so(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exploding(FedAvg):
        def aggregate_train(self, *given: Any) -> Any:
            arrays, metrics = super().aggregate_train(*given)
            assert arrays is not None
            arrays["head.bias"] = Array(np.full(10, np.inf, np.float32))
            return arrays, metrics

    monkeypatch.setitem(builtin.STRATEGIES, "fedavg", (Exploding, {}))  # type: ignore[arg-type]
    fails = "the model diverged: NaN or infinity in 'head.bias'; lower local.lr, or eta in flower.options"
    folder = federate(LocalGrid(client_app, 2), fails=fails, **{"flower.strategy": "fedavg"})
    assert not folder.model_path.exists()
    assert not folder.finished


class LostOnce(LocalGrid):
    """Node 1 is being started again when it is asked who it is."""

    def __init__(self, code: int) -> None:
        super().__init__(client_app, 2)
        self.code = code

    def _answer(self, message: Message) -> str:
        sent = super()._answer(message)
        if self.asked[-1] == ("query.describe", 1) and self.asked.count(self.asked[-1]) == 1:
            self._arrived[sent] = [Message(Error(self.code, "lost"), reply_to=message)]
        return sent


@pytest.mark.parametrize("code", [0, 5, 8])  # Ray's, node unavailable, ClientApp crashed
def test_a_node_that_was_lost_is_asked_again(federate: Federate, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(meeting, "LOST", 0.1)
    monkeypatch.setattr(meeting, "LOOK", 0.05)
    grid = LostOnce(code)
    assert federate(grid, **{"flower.node-wait": 60.0}).finished
    assert grid.clients_asked("query.describe") == [0, 1, 1]


class Slow(LocalGrid):
    """Node 0 says who it is only after node 2 has, which comes later than the others."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return super().get_node_ids()[: 2 if self.looks < 3 else 3]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = ("query.describe", 2) in self.asked
        held = [sent for sent in message_ids if ready or self._of(sent) != self.node(0)]
        return super().pull_messages(held)

    def _of(self, sent: str) -> int:
        return self._arrived[sent][0].metadata.src_node_id if sent in self._arrived else 0


def test_newcomers_are_asked_while_a_slow_node_is_waited_for_and_its_answer_counts(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "LOOK", 0.05)
    grid = Slow(client_app, 3)
    assert federate(grid, **{"flower.node-wait": 60.0}).finished
    assert grid.clients_asked("query.describe") == [0, 1, 2]


class Forgetful(LocalGrid):
    """Node 1 is started again so quickly that nobody misses it, and has forgotten what it was asked."""

    def _answer(self, message: Message) -> str:
        sent = super()._answer(message)
        if self.asked[-1] == ("query.describe", 1) and self.asked.count(self.asked[-1]) == 1:
            self._arrived[sent] = []
        return sent


def test_a_node_that_stays_silent_is_asked_again(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SILENT", 0.2)
    monkeypatch.setattr(meeting, "LOOK", 0.05)
    grid = Forgetful(client_app, 2)
    assert federate(grid, **{"flower.node-wait": 60.0}).finished
    assert grid.clients_asked("query.describe") == [0, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flower.strategy": "fedavgg"}, "flower.strategy = 'fedavgg' is unknown; use oneshot | fedavg"),
        ({"flower.strategy": "fedavg", "upload.dtype": "float16"}, "half precision"),
        ({"flower.strategy": "fedavg", "resume-from": "x"}, "resume-from needs"),
        ({"flower.rounds": 2}, "flower.rounds = 2"),
        ({"method": "fedmitre"}, "fedmitre"),
        ({"method": "ensemble", "evaluate.where": "clients"}, "no single model"),
        ({"local.epochz": 2}, "local.epochz"),
        ({"local.epochs": "nine"}, "local.epochs = 'nine'"),
    ],
)
def test_bad_settings_fail_before_any_client_is_asked(settings: dict[str, Any], message: str) -> None:
    grid = LocalGrid(client_app, 2)
    with task_identity(), pytest.raises(ConfigError) as caught:
        server_app(grid, server_context(TINY | settings))
    assert message in str(caught.value)
    assert not grid.asked


def test_a_method_is_checked_with_the_clients_that_there_are() -> None:
    grid = LocalGrid(client_app, 3)  # the default of partition.clients is 5
    with task_identity(), pytest.raises(ConfigError, match=r"krum.hostile = 1 needs 4 uploads, not 3"):
        server_app(grid, server_context(TINY | {"method": "krum"}))
    assert not grid.clients_asked("train")


def test_an_upload_whose_line_in_the_metrics_cannot_be_written_is_no_refused_one(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_metrics = RunFolder.log_metrics

    def full(folder: RunFolder, **values: Any) -> None:
        if values.get("stage") == "upload" and values["client"] == 1:
            raise RunError("cannot write metrics.jsonl: No space left on device")
        log_metrics(folder, **values)

    monkeypatch.setattr(RunFolder, "log_metrics", full)
    folder = federate(LocalGrid(client_app, 2))
    assert len(folder.load_uploads()) == 2
    assert not list(folder.refused_path.iterdir())
    assert "client 1: its upload is on disk, but not in the metrics" in caplog.text


def test_an_upload_that_cannot_be_written_is_held_until_it_can(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full for the first tries, past the deadline; nobody trains twice, and nothing is lost."""
    whole = federate(LocalGrid(client_app, 3))
    save, tries = RunFolder.save_upload, itertools.count(1)

    def full(folder: RunFolder, upload: Upload) -> Path:
        if upload.client == 1 and next(tries) < 8:
            raise DiskError("cannot write x: No space left on device; make room there, and go on with resume-from")
        return save(folder, upload)

    monkeypatch.setattr(RunFolder, "save_upload", full)
    monkeypatch.setattr(intake, "PAUSE", 0.1)
    monkeypatch.setattr(intake, "REMIND", 0.35)
    grid = LocalGrid(client_app, 3)
    folder = federate(grid, **{"flower.upload-timeout": 0.3})
    assert next(tries) == 9
    assert grid.clients_asked("train") == [0, 1, 2]
    assert all_bits(folder) == all_bits(whole)
    complaints = [record.message for record in caplog.records if "held in memory" in record.message]
    assert len(complaints) == 2  # not one for each try
    assert complaints[0].startswith("client 1: cannot write x: No space left on device; make room there")
