"""What a client is sent of the settings: what it needs, and nothing of the others or of the server's disk."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from local_grid import task_identity

from fedmitr_flwr.config import Config
from server_app.records import addressed, order

SERVER: dict[str, Any] = {
    "out-dir": "/srv/secret-out",
    "resume-from": "/srv/secret-run",
    "model.weights": "/srv/secret-models/start.safetensors",
    "data.source": "parquet",
    "data.path": "/srv/secret-data",
    "flower.clients": "hospital-a | factory",
    "feddf.path": "/srv/secret-proxy",
    "local.lr": 0.5,
    "upload.dtype": "float16",
    "seed": 7,
}


@pytest.mark.parametrize("scheme", ["own", "iid"])
def test_an_order_has_no_other_clients_name_and_no_server_path(scheme: str) -> None:
    sent = order(Config.from_flat(SERVER | {"partition.scheme": scheme}))
    text = sent["toml"].decode()
    for secret in (
        "hospital",
        "factory",
        "secret-out",
        "secret-run",
        "secret-models",
        "secret-proxy",
        "screen",
        "krum",
    ):
        assert secret not in text, secret
    assert ("/srv/secret-data" in text) is (scheme != "own")  # shares of one data set are dealt out at the clients
    read = Config.from_toml(text)
    assert (read.local.lr, read.upload.dtype, read.seed, read.partition.scheme) == (0.5, "float16", 7, scheme)
    assert read.model.weights == "start.safetensors"


def test_each_client_is_told_its_own_number() -> None:
    content = RecordDict({"config": ConfigRecord({"toml": b"", "server-round": 1})})  # one record for all messages
    with task_identity():
        messages = [addressed(Message(content, node, "train"), client) for client, node in enumerate((11, 12))]
    numbers = [message.content["config"] for message in messages]
    assert [dict(each) for each in numbers] == [{"toml": b"", "server-round": 1, "client": client} for client in (0, 1)]
    assert "client" not in content["config"]
