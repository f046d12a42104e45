"""Accuracy, loss and recall by hand, whatever the batch size; result.json and the table at the end of a run."""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import small
from torch import Tensor

from fedmitr_flwr.common import provenance
from fedmitr_flwr.common.fingerprint import fingerprint, of_method
from fedmitr_flwr.config import Config, DataConfig
from fedmitr_flwr.data.images import DataSet, Images, prepare
from fedmitr_flwr.runs import evaluation
from fedmitr_flwr.runs.evaluation import evaluate
from fedmitr_flwr.runs.folder import plain
from fedmitr_flwr.runs.result import accuracy_table, build, on_server


def a_result(**parts: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"config": Config(seed=3).with_clients(2), "device": "cpu", "bytes_up": [400, 400]}
    given |= {"student": 61.23456, "fedavg": 20.0, "ensemble": 70.005001, "local": [45.0, 12.345678]}
    given |= {"per_class": {"cat": 100 / 3, "dog": math.nan}, "seconds": {"local": 1.23456, "distil": 2}}
    given |= {"counts": [[1, 2], [3, 0]], "partition_sha256": "ab" * 32}
    return build(**given | parts)


def test_what_a_reader_needs_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor is named, and a package that is not installed is null."""
    made = a_result(teacher_forwards=12)
    assert (made["method"], made["seed"], made["clients"], made["teacher_forwards"]) == ("fedmitr", 3, 2, 12)
    assert made["config"] == Config(seed=3).with_clients(2).to_flat()
    assert (made["fingerprint"], made["core"]) == (fingerprint(), of_method("fedmitr"))
    assert (made["counts"], made["partition_sha256"]) == ([[1, 2], [3, 0]], "ab" * 32)
    assert (made["bytes_up"], made["bytes_down"], made["client_seconds"]) == ([400, 400], None, None)
    assert made["seconds"] == {"local": 1.235, "distil": 2.0}
    assert made["versions"].keys() == {"python", "torch", "timm", "numpy", "flwr"}
    assert (made["versions"]["python"], made["versions"]["torch"]) == (platform.python_version(), version("torch"))
    assert (made["machine"]["device"], made["machine"]["cores"] >= 1) == ("cpu", True)
    assert json.loads(json.dumps(plain(made))) == made
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 3000\n")
    assert provenance._cpu(tmp_path / "cpuinfo") == "Abacus 3000"
    assert provenance._cpu(tmp_path / "none")
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.versions()["no-such-package"] is None


def test_numbers_are_rounded_to_what_they_are_worth() -> None:
    made = a_result(client_seconds=[1.23456, None], server_seconds=2, confusion=((1, 2), (0, 3)))
    rounded = {"student": 61.23, "fedavg": 20.0, "ensemble": 70.01, "local": [45.0, 12.35], "worst_class": 33.33}
    assert made["accuracy"] == rounded | {"per_class": {"cat": 33.33, "dog": None}}
    assert (made["client_seconds"], made["server_seconds"]) == ([1.235, None], 2.0)
    assert made["confusion"] == [[1, 2], [0, 3]]
    assert a_result(per_class=None)["accuracy"]["worst_class"] is None


def test_the_table_which_says_when_it_is_of_validation_images() -> None:
    table = accuracy_table(a_result())
    assert table == (
        "model                      accuracy %\n"
        "-------------------------------------\n"
        "client 0 alone                  45.00\n"
        "client 1 alone                  12.35\n"
        "clients alone, mean             28.68\n"  # (45.00 + 12.35) / 2 = 28.675
        "fedavg, one round               20.00\n"
        "ensemble of all clients         70.01\n"
        "fedmitr (student)               61.23\n"
        "\n"
        "recall % of the student by class\n"
        "cat  33.33   dog      -"
    )
    of_test, of_validation = (on_server(DataConfig(validation=share), 287) for share in (0.0, 0.2))
    assert of_test == {"where": "server", "split": "test", "images": 287}
    assert accuracy_table(a_result(evaluated_on=of_test)) == table
    said = "on 287 validation images; the test images were not read"
    assert accuracy_table(a_result(evaluated_on=of_validation)) == f"{table}\n\n{said}"


def test_what_is_not_known_is_a_dash_and_lines_stay_short() -> None:
    rows = accuracy_table(a_result(student=None, fedavg=None, ensemble=None, local=[], per_class=None)).splitlines()
    assert [row.split()[-1] for row in rows[2:]] == ["-"] * 4
    assert {len(row) for row in rows} == {len(rows[0])}
    assert accuracy_table(a_result(local=[50.0, None])).splitlines()[4] == "clients alone, mean             50.00"
    names = [f"{'long ' * (number % 4)}class {number}" for number in range(100)]
    lines = accuracy_table(a_result(per_class=dict.fromkeys(names, 100.0), local=[100.0] * 20)).splitlines()
    cells = lines[lines.index("") + 2 :]
    assert len({len(line) for line in cells[:-1]}) == 1
    assert max(map(len, lines)) <= 100
    assert sum(line.count("100.00") for line in cells) == 100


# --- evaluation


def by_brightness(images: Tensor) -> Tensor:
    """Scores of three classes from the first pixel of normalised grey images: -1, 0 and 1 are classes 0, 1 and 2."""
    first = images[:, 0, 0, 0].round()
    return torch.stack([-first, -first.abs() + 0.5, first], dim=1) * 2


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_accuracy_loss_and_recall_by_hand(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels for the classes 0 0 1 1 2 2; labels 0 1 1 1 0 0: right are the first, third and fourth."""
    monkeypatch.setattr(evaluation, "BATCH", batch_size)
    values = torch.tensor([0, 0, 128, 128, 255, 255], dtype=torch.uint8)
    six = Images(values[:, None, None, None].expand(-1, 1, 4, 4), torch.tensor([0, 1, 1, 1, 0, 0]))
    found = evaluate(by_brightness, six, small(4, num_classes=3), torch.device("cpu"))
    assert (found.accuracy, found.num_examples) == (50.0, 6)
    assert found.per_class == pytest.approx((100 / 3, 200 / 3, math.nan), nan_ok=True)
    assert found.confusion == ((1, 0, 2), (1, 2, 0), (0, 0, 0))
    # The scores are (2, -1, -2), (0, 1, 0) and (-2, -1, 2); minus the log of softmax at the label, by hand.
    dark, grey = math.log(math.exp(2) + math.exp(-1) + math.exp(-2)), math.log(2 + math.e)
    wanted = ((dark - 2) + (dark + 1) + 2 * (grey - 1) + 2 * (dark + 2)) / 6
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    # Sure by e²/dark of two pairs, one right and none right, and by e/grey of two that are right: each pair in one bin.
    low, high = math.e / math.exp(grey), math.exp(2 - dark)
    ece = 100 * ((2 * high - 1) + (2 - 2 * low) + 2 * high) / 6
    assert found.calibration == {"nll": round(found.loss, 4), "ece": round(ece, 2)}


def test_images_arrive_resized_and_normalised(tiny: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 20)
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        assert not torch.is_grad_enabled()
        return torch.zeros(len(images), 3)

    found = evaluate(predict, tiny.test, small(12, num_classes=3), torch.device("cpu"))
    assert [tuple(batch.shape) for batch in seen] == [(20, 1, 12, 12), (10, 1, 12, 12)]
    assert torch.equal(torch.cat(seen), prepare(tiny.test.pixels, small(12)))
    assert (found.accuracy, found.loss) == (pytest.approx(100 / 3), pytest.approx(math.log(3)))
