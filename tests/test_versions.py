"""Client and server of different code or different Flower: neither works with the other, and says what to do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from local_grid import TINY, LocalGrid, complaint

from client_app.app import app as client_app
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.common.releases import FLWR, release, require, too_old
from fedmitr_flwr.config import Config
from server_app.clients import meet
from server_app.records import order

ROOT = Path(__file__).parents[1]


def test_older_is_by_the_first_two_numbers_and_not_by_letter() -> None:
    versions = {"1.41.0": (1, 41), "1.42.0.dev20261101": (1, 42), "2.0": (2, 0), "1.9.3": (1, 9)}
    versions |= dict.fromkeys(("", "none", "1"), (0, 0))
    assert {version: release(version) for version in versions} == versions
    assert too_old("1.9.0", "1.41.0")
    assert too_old("1.41.5", "1.41.0") is None
    assert too_old("1.41.0", "1.41.2") is None  # the last number is repairs
    assert too_old("2.0.0", "1.41.0") is None
    require(FLWR)


@pytest.mark.parametrize("app", ["client_app", "server_app"])
def test_an_app_under_an_older_flower_says_so_before_it_imports_from_it(app: str) -> None:
    code = (
        "import sys, types; old = sys.modules['flwr'] = types.ModuleType('flwr'); old.__version__ = '1.30.0'\n"
        f"import {app}.app"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: this app cannot be loaded: flwr 1.30.0 is too old; run there: pip install "
        f"'flwr[simulation]~={FLWR}'"
    )


class OtherCards(LocalGrid):
    """Client 1 says something else of itself, as another version of the app might."""

    def __init__(self, change: Callable[[Message], Message]) -> None:
        super().__init__(client_app, 3)
        self.change = change

    def pull_messages(self, message_ids: Any) -> list[Message]:
        replies = super().pull_messages(message_ids)
        return [self.change(r) if r.metadata.src_node_id == self.node(1) else r for r in replies]


def flwr(version: str | None) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        texts = dict(reply.content["name"]) | {"flwr": version}
        reply.content["name"] = ConfigRecord({key: text for key, text in texts.items() if text is not None})
        return reply

    return change


def card(**changes: Any) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        said = dict(reply.content["card"]) | {key.replace("_", "-"): value for key, value in changes.items()}
        reply.content["card"] = MetricRecord(said)
        return reply

    return change


def without(name: str) -> Callable[[Message], Message]:
    def change(reply: Message) -> Message:
        del reply.content[name]
        return reply

    return change


def cannot_load(reply: Message) -> Message:
    error = Message(Error(1, "An exception was raised when attempting to load `ClientApp`"), reply_to=reply)
    error.metadata.__dict__.update(reply.metadata.__dict__)
    return error


OTHERS: dict[str, tuple[Callable[[Message], Message], str]] = {
    "older flower": (flwr("1.39.0"), r"client 1 \(node 1007\): flwr 1.39.0 is too old; run there: pip install 'flwr"),
    "no version": (flwr(None), r"client 1 \(node 1007\): flwr of an unknown version is too old"),
    "other code": (card(fingerprint=0xABC), r"client 1 \(node 1007\) runs other code \(000000000abc\).*restart"),
    "no card": (without("card"), "node 1007 does not say who it is as this app does; restart the SuperLink"),
    "no texts": (without("name"), "node 1007 does not say who it is"),
    "a list for a number": (card(partition_id=[1, 2]), "node 1007 does not say who it is"),
    "infinity for a number": (card(partition_id=float("inf")), "node 1007 does not say who it is"),
    "not loaded": (cannot_load, "node 1007 cannot take part: .*its SuperNode's log says why: .* flwr >= 1.41.0"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_server_refuses_before_anybody_trains(name: str) -> None:
    change, line = OTHERS[name]
    grid = OtherCards(change)
    with pytest.raises(RunError, match=line) as refused:
        meet(grid, Config.from_flat(TINY))
    assert "\n" not in str(refused.value)
    assert not grid.clients_asked("train")


@pytest.mark.parametrize("kind", ["query.describe", "train", "evaluate"])
def test_the_client_refuses_a_server_of_other_code_and_does_not_read_its_settings(kind: str) -> None:
    grid = LocalGrid(client_app, 2)
    record = ConfigRecord(
        dict(order(Config.from_flat(TINY))) | {"fingerprint": b"0123456789ab", "toml": b"new-key = 3"}
    )
    content = RecordDict({"arrays": ArrayRecord(), "config": record})
    (reply,) = grid.send_and_receive([Message(content, grid.node(0), kind)])
    assert complaint(reply) == (
        f"the server runs other code (0123456789ab) than this client ({core()}); restart the SuperLink and its "
        "SuperNodes from one checkout"
    )


def test_equal_sides_meet() -> None:
    assert meet(LocalGrid(client_app, 3), Config.from_flat(TINY)).number == 3
