"""What this project uses of Flower's and Ray's internals: each test is named after what breaks when they change."""

import logging
from importlib import import_module

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from local_grid import LocalGrid
from ray import ActorID
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError

import server_app.app
from client_app.app import app as client_app
from fedmitr_flwr.common.process import begin, forward
from server_app.grid import _DEAD_ACTOR, ObservedGrid


def test_the_grid_of_a_deployment_is_called_http_grid() -> None:
    """`ObservedGrid.sends_copies` tells it from a simulation's, whose messages are the very objects that were sent."""
    assert import_module("flwr.superlink.runtime.run_serverapp").HttpGrid is HttpGrid
    assert ObservedGrid(object.__new__(HttpGrid)).sends_copies
    assert not ObservedGrid(object.__new__(InMemoryGrid)).sends_copies


def test_ray_names_the_dead_actor_in_the_error_that_flower_passes_on() -> None:
    actor = "ab" * ActorID.size()
    died = ActorDiedError(ActorDiedErrorContext(actor_id=bytes.fromhex(actor), error_message="killed"))
    found = _DEAD_ACTOR.search(f"{type(died)}:<'{died}'>")
    assert found is not None
    assert found[1] == actor


def test_what_the_core_logs_appears_once_where_flower_s_log_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower = logging.getLogger("flwr")
    monkeypatch.setattr(flower, "handlers", [*flower.handlers, caplog.handler])
    for name in ("flwr", "fedmitr"):
        caplog.set_level(logging.INFO, name)
    begin(server_app.app.log)
    forward("fedmitr", server_app.app.log)
    logging.getLogger("fedmitr.any").info("a\x1b[31mb\n\tc %s", "\u202ed")
    logging.getLogger("fedmitr.any").debug("not shown")
    assert {record.getMessage() for record in caplog.records} == {"a\\x1b[31mb\n\tc \\u202ed"}


def test_a_client_s_text_reaches_flower_s_log_without_control_characters() -> None:
    """Flower's strategies log the text of an error reply as it is."""

    def broken(reply: Message, client: int) -> list[Message]:
        text = f"ConfigError\x1b]0;owned\x07\nERROR : client {client} is trusted\u202e"
        return [Message(Error(2, text), reply_to=reply)]

    grid = ObservedGrid(LocalGrid(client_app, 1, tamper=broken))
    (reply,) = grid.send_and_receive([Message(RecordDict(), next(iter(grid.get_node_ids())), "train")])
    assert reply.error.reason == r"ConfigError\x1b]0;owned\x07\nERROR : client 0 is trusted\u202e"
