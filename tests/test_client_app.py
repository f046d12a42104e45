"""What a client is sent, and what it replies: to every strategy of Flower the same, and no more than it must tell."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, complaint, of_two
from tiny import same

from client_app.app import KEYS, discreet
from client_app.app import app as client_app
from fedmitr_flwr import pipeline
from fedmitr_flwr.common.errors import DataError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.config import Config
from fedmitr_flwr.vit.build import initial_weights
from server_app.records import UPLOAD, addressed, order, read_upload


def ask(
    kind: str, config: Config, arrays: ArrayRecord | None = None, client: int = 0, node: Any = (), **told: Any
) -> Message:
    """Ask one client of two, which perhaps was started with more in its --node-config."""
    grid = LocalGrid(client_app, 2)
    grid.contexts[grid.node(client)].node_config |= node
    record = ConfigRecord({**order(config), **{key.replace("_", "-"): value for key, value in told.items()}})
    content = RecordDict({"arrays": arrays or ArrayRecord(), "config": record})
    (reply,) = grid.send_and_receive([Message(content, grid.node(client), kind)])
    return reply


def test_a_reply_is_one_record_of_arrays_and_one_of_numbers() -> None:
    reply = ask("train", of_two())
    assert {name: type(record) for name, record in reply.content.items()} == UPLOAD
    metrics = reply.content["metrics"]
    assert set(metrics) == {"num-examples", "train_loss", "partition-id", "fingerprint", "seconds"}
    assert metrics["num-examples"] == 75  # half of 150
    assert metrics["seconds"] > 0
    assert metrics["fingerprint"] == int(core(), 16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_upload_arrives_as_it_was_made(dtype: str) -> None:
    config = of_two(**{"upload.dtype": dtype, "upload.extras": "counts"})
    made = pipeline.train_client(config, 1, initial_weights(config.model, config.seed))
    reply = ask("train", config, client=1)
    read = read_upload(reply, 1, config)
    assert all(tensor.dtype == getattr(torch, dtype) for tensor in read.weights.values())
    assert list(read.weights) == list(made.weights)
    assert same(read.weights, made.weights)
    for name in ("client", "num_examples", "train_loss", "fingerprint", "class_counts", "num_bytes"):
        assert getattr(read, name) == getattr(made, name)
    assert read_upload(reply, 1, of_two()).class_counts is None  # they were not asked for


def test_the_start_the_round_and_a_proximal_term_decide_the_training() -> None:
    """Without arrays the seed gives the start."""
    config = of_two(seed=3)
    public, other = (ArrayRecord(dict(initial_weights(config.model, seed))) for seed in (3, 4))
    plain = weights(ask("train", config))
    assert plain == weights(ask("train", config, public)) == weights(ask("train", config, server_round=1))
    others = [ask("train", config, other), ask("train", config, server_round=2), ask("train", config, proximal_mu=5.0)]
    assert len({plain, *map(weights, others)}) == 4


def weights(reply: Message) -> bytes:
    return b"".join(array.data for array in reply.content["arrays"].values())


def test_describe_names_the_client() -> None:
    told = ask("query.describe", of_two(), client=1).content
    assert dict(told["card"]) == {"partition-id": 1, "num-partitions": 2, "fingerprint": int(core(), 16), "own-data": 0}
    assert dict(told["name"]) == {"name": "", "flwr": version("flwr")}


@pytest.mark.parametrize("counts", [False, True])
def test_evaluation_tells_the_recall_by_class_only_by_choice(counts: bool) -> None:
    changes = {"evaluate.where": "clients", "evaluate.holdout": 0.4, "upload.extras": "counts" * counts}
    config = of_two(**changes)
    reply = ask("evaluate", config)
    assert ("recall" in reply.content["metrics"]) == counts
    expected = pipeline.evaluate_client(config, 0, initial_weights(config.model, config.seed))
    assert reply.content["metrics"]["accuracy"] == expected.accuracy
    assert reply.content["metrics"]["eval_loss"] == expected.loss
    assert reply.content["metrics"]["num-examples"] == expected.num_examples == 30


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DataError("in /home/x rays/ann lee.png it is cut short;\nget it again"), "in <path>; get it again"),
        (DataError("no column 'label' in '/secret folder/part 0.parquet'"), "no column 'label' in <path>"),
        (DataError(r"cannot read C:\Users\ann\x.png"), "cannot read <path>"),
        (RuntimeError("image of patient 17: /data/17.png"), "RuntimeError"),
    ],
)
def test_an_error_tells_neither_data_nor_paths(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "train_client", fail)
    reply = ask("train", of_two())
    assert reply.has_error()
    assert reply.error.reason == told
    assert reply.error.code == 2
    assert str(error).splitlines()[0] in caplog.text  # the client's own log has it all


# What a file may be called, but for a clause's end inside the name.
names = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=12).filter(
    lambda name: "/" not in name and not re.search(r"[;:]\s|[;:]$|\\$", name) and name.strip() == name
)


@given(
    st.lists(names, min_size=1, max_size=4),
    st.sampled_from(["{}: it is cut short; get it again", "{} is bad", "in {!r}, row 3"]),
)
def test_no_part_of_a_path_is_told_whatever_its_name(parts: list[str], form: str) -> None:
    secret = [f"s3cret{part}s3cret" for part in parts]
    path = "/" + "/".join(secret)

    @discreet
    def fail(message: Message, context: Any) -> Message:
        del message, context
        raise DataError(form.format(path))

    told = fail(Message(RecordDict(), 1, "train"), None).error.reason
    assert "s3cret" not in told
    assert "<path>" in told


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"max-epsilon": 0}, "max-epsilon = 0 is not possible; use a number above 0, or leave it out for no limit"),
        ({"max-epsilon": float("nan")}, "max-epsilon = nan is not possible"),
        ({"max-epsilon": "8"}, "max-epsilon = '8' is not possible"),
        ({"max-epsilon": True}, "max-epsilon = True is not possible"),
        ({"max-epsilon": 8, "max-delta": 0}, "max-delta = 0 is not possible; .* leave it out for 1e-05"),
        ({"max-delta": 1e-5}, "max-delta limits nothing by itself; give a max-epsilon with it"),
        ({"max_epsilon": 8}, "--node-config has 'max_epsilon', which nothing reads; use client-name, .*max"),
    ],
)
def test_a_node_whose_limit_would_not_hold_takes_no_part(node: dict[str, Any], told: str) -> None:
    for kind in ("query.describe", "train"):
        assert re.match(f"this node's {told}", complaint(ask(kind, of_two(), node=node)))


def test_what_the_guide_says_of_a_node_is_what_is_read() -> None:
    guide = (Path(__file__).parents[1] / "deploy" / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| Key \|.*?\n\n", guide, re.MULTILINE | re.DOTALL)
    assert rows
    assert re.findall(r"`([a-z-]+)`", "".join(line.split("|")[1] for line in rows[0].splitlines()[2:-1])) == list(KEYS)


SERVER: dict[str, Any] = {
    "out-dir": "/srv/secret-out",
    "resume-from": "/srv/secret-run",
    "model.weights": "/srv/secret-models/start.safetensors",
    "data.source": "parquet",
    "data.path": "/srv/data",
    "flower.clients": "hospital-a | factory",
    "feddf.path": "/srv/secret-proxy",
}
KNOWN = {"local.lr": 0.5, "upload.dtype": "float16", "seed": 7}


@pytest.mark.parametrize("scheme", ["own", "iid"])
def test_an_order_has_no_other_clients_name_and_no_server_path(scheme: str) -> None:
    known = KNOWN | {"partition.scheme": scheme}
    text = order(Config.from_flat(SERVER | known))["toml"].decode()
    assert not re.search("secret|hospital|factory|screen|krum", text)
    assert ("/srv/data" in text) is (scheme != "own")  # shares of one data set are dealt out at the clients
    read = Config.from_toml(text).to_flat()
    assert {key: read[key] for key in known} == known
    assert read["model.weights"] == "start.safetensors"


def test_each_client_is_told_its_own_number() -> None:
    content = RecordDict({"config": ConfigRecord({"toml": b"", "server-round": 1})})  # one record for all messages
    messages = [addressed(Message(content, 11 + client, "train"), client) for client in range(2)]
    told = [dict(message.content["config"]) for message in messages]
    assert told == [{"toml": b"", "server-round": 1, "client": client} for client in range(2)]
    assert "client" not in content["config"]
