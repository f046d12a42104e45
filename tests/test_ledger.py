"""A client's ledger: ε adds up over runs, nothing is counted twice, and a limit holds whatever happens to the file."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import an_upload, settings

from client_app.ledger import Ledger
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.uploads.upload import Upload


def spending(epsilon: float, client: int) -> Upload:
    """Of different clients: other weights, as other training would give."""
    return replace(an_upload(settings(), client), epsilon=epsilon)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "work/privacy.jsonl", "/data/images", 5.0)


def test_epsilon_adds_up_to_the_limit_and_no_further(ledger: Ledger) -> None:
    assert ledger.spent() == 0
    ledger.note(spending(2.0, 0), 1e-5, "first")
    ledger.note(spending(2.0, 0), 1e-5, "first")  # sent again
    ledger.require_room(3.0, "second")
    ledger.note(spending(3.0, 1), 1e-5, "second")
    assert ledger.spent() == 5.0
    told = "max-epsilon = 5 bounds all uploads of its images together: 5 are spent .* and this run asks for 0.1"
    with pytest.raises(ConfigError, match=told):
        ledger.require_room(0.1, "third")
    with pytest.raises(ConfigError, match=told):
        ledger.note(spending(0.1, 2), 1e-5, "second")  # trained anew: its upload was not kept
    ledger.require_room(3.0, "second")  # whose upload was lost on its way
    assert Ledger(ledger.path, "/data/others", 5.0).spent() == 0
    assert len(ledger.path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "content", ['{"data": "/data/im', "[1]", '{"data": "/data/images", "epsilon": "much"}', "\x00"]
)
def test_a_damaged_ledger_lets_nothing_out(ledger: Ledger, content: str) -> None:
    ledger.note(spending(2.0, 0), 1e-5, "first")
    with ledger.path.open("a") as file:
        file.write(content)
    with pytest.raises(ConfigError, match="is damaged, so that what this node has spent of max-epsilon is not known"):
        ledger.note(spending(1.0, 1), 1e-5, "second")


def test_what_cannot_be_written_down_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write down what it spends of max-epsilon"):
        Ledger(tmp_path / "work/privacy.jsonl", "/data", 5.0).note(spending(2.0, 0), 1e-5, "first")
