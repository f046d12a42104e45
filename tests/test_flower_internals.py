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


def test_the_ids_of_a_message_can_be_set_in_its_metadata() -> None:
    """`ObservedGrid._read` and `_failure` write them: a reply's own words do not decide which question it answers."""
    question = Message(RecordDict(), 7, "train")
    question.metadata.__dict__["_message_id"] = "asked"
    reply = Message(Error(2, "no"), reply_to=question)
    assert reply.metadata.reply_to_message_id == "asked"
    reply.metadata.__dict__["_reply_to_message_id"] = "other"
    assert reply.metadata.reply_to_message_id == "other"
    assert reply.metadata.src_node_id == 7


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


def test_what_the_core_logs_appears_once_where_flower_s_log_does(caplog: pytest.LogCaptureFixture) -> None:
    flower, core = logging.getLogger("flwr"), logging.getLogger("fedmitr")
    before = core.handlers[:], core.propagate, core.level, flower.handlers[:], flower.level
    try:
        flower.addHandler(caplog.handler)
        flower.setLevel(logging.INFO)
        begin(server_app.app.log)
        forward("fedmitr", server_app.app.log)
        logging.getLogger("fedmitr.any").info("a\x1b[31mb\n\tc %s", "\u202ed")
        logging.getLogger("fedmitr.any").debug("not shown")
    finally:
        core.handlers[:], core.propagate, flower.handlers[:] = before[0], before[1], before[3]
        core.setLevel(before[2])
        flower.setLevel(before[4])
    assert {record.getMessage() for record in caplog.records} == {"a\\x1b[31mb\n\tc \\u202ed"}


def test_a_client_s_text_reaches_flower_s_log_without_control_characters() -> None:
    """Flower's strategies log the text of an error reply as it is."""

    def broken(reply: Message, client: int) -> list[Message]:
        text = f"ConfigError\x1b]0;owned\x07\nERROR : client {client} is trusted\u202e"
        return [Message(Error(2, text), reply_to=reply)]

    grid = ObservedGrid(LocalGrid(client_app, 1, tamper=broken))
    (reply,) = grid.send_and_receive([Message(RecordDict(), next(iter(grid.get_node_ids())), "train")])
    assert reply.error.reason == r"ConfigError\x1b]0;owned\x07\nERROR : client 0 is trusted\u202e"
