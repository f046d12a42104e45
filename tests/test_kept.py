"""What a client keeps: its upload, which answers the same question again, and the ledger of the ε that it spent."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CPU, a_vit, an_upload, same, settings

from client_app.ledger import Ledger
from fedmitr_flwr.common.errors import ConfigError
from fedmitr_flwr.data.images import DataSet, Images
from fedmitr_flwr.uploads import cache as kept
from fedmitr_flwr.uploads.upload import Upload


def equal(one: Upload, other: Upload) -> bool:
    """To the bit, with types."""
    pairs = [(one.weights, other.weights), (one.statistics or {}, other.statistics or {})]
    facts = [replace(each, weights={}, statistics=None).__dict__ for each in (one, other)]
    typed = all(a[name].dtype == b[name].dtype for a, b in pairs for name in a)
    return all(same(*pair) for pair in pairs) and typed and facts[0] == facts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_recalled_is_what_was_sent(tmp_path: Path, dtype: torch.dtype) -> None:
    upload = an_upload(settings(), 1, counts=(3, 7))
    weights = {name: tensor.to(dtype) for name, tensor in upload.weights.items()}
    upload = replace(upload, weights=weights, seconds=2.5, statistics={"sums": torch.ones(3, 2).double()})
    kept.keep(tmp_path / "deep" / "x", "key", upload)
    found = kept.recall(tmp_path / "deep" / "x", "key")
    assert found is not None
    assert equal(found, upload)


def test_it_trains_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained: list[Upload] = []

    def train() -> Upload:
        trained.append(an_upload(settings(), 2, seed=len(trained)))
        return trained[-1]

    with caplog.at_level(logging.INFO, "fedmitr"):
        found = [kept.once(tmp_path / "x", key, train) for key in ("a", "a", "b", "b", "a")]
    assert [trained.index(next(one for one in trained if equal(each, one))) for each in found] == [0, 0, 1, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]  # the next upload takes its place
    assert caplog.text.count("client 2: this upload was made for an earlier start") == 2


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_is_trained_again(tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x"
    kept.keep(path, "key", an_upload(settings(), 0))
    path.write_bytes(path.read_bytes()[:keep])
    assert kept.recall(path, "key") is None
    assert "the client trains again" in caplog.text


def test_where_nothing_can_be_kept_the_upload_goes_its_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    upload = an_upload(settings(), 0)
    assert kept.once(tmp_path / "file" / "x", "key", lambda: upload) is upload
    assert "this client's upload cannot be kept" in caplog.text


def test_the_key_names_everything_that_decides(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    initial = dict(a_vit(settings(), 0).state_dict())
    pixels, labels = tiny.train.pixels, tiny.train.labels

    def key(**changed: object) -> str:
        asked = {"facts": {"seed": 0}, "initial": initial, "images": tiny.train, "device": CPU} | changed
        return kept.key_of(**asked)  # type: ignore[arg-type]

    changes: list[dict[str, object]] = [
        {},
        *({"facts": facts} for facts in ({"seed": 1}, {"seed": 0, "client": 1})),
        {"initial": initial | {"head.bias": initial["head.bias"] + 1}},
        *({"images": images} for images in (Images(pixels // 2, labels), Images(pixels, labels.flip(0)))),
        {"device": torch.device("cuda")},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys == [key(**change) for change in changes]
    monkeypatch.setattr(kept, "core", lambda: "other code")
    assert key() not in keys


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
