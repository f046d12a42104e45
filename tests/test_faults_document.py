"""docs/faults.md: its lines say what the files say, and it is up to date."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import demo

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # no package: it is where the script runs
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "faults.py"))  # tests/faults.py has the name `faults`


def fault(name: str, **other: Any) -> dict[str, Any]:
    row = {"fault": name, "reads": [], "disk": [], "status": 1, "goes_on": "resume-from", "asked": ["b"]}
    return row | {"trained": ["a", "b", "b"], "same_bits": True, "code": "0123456789ab"} | other


def test_a_fault_becomes_a_line() -> None:
    disk = ["config.toml", "metrics.jsonl", "uploads/client_0.safetensors", "work/images-0-0.safetensors"]
    flower_s = ["Exit Code: 201", "client 1 failed", "1 of 2 uploads are in RUN/uploads and 2 are needed"]
    rows = [
        fault("nothing"),
        fault("disk full", reads=["client 1:  no room | wait", "again"], disk=disk),
        fault("restart", disk=["config.toml", "result.json"], asked=[], trained=[]),
        fault("killed", reads=flower_s, disk=["config.toml"], asked=["a", "b"], trained=["b", "a"]),
    ]
    assert SCRIPT["fault_lines"](rows)[2:] == [
        "| disk full | `client 1: no room \\| wait`<br>`again` | `uploads/client_0.safetensors`<br>"
        "`work/images-0-0.safetensors` | resume-from | b | a, b 2x |",
        "| restart | nothing | everything | resume-from | none | none |",
        "| killed | `client 1 failed` | no upload | resume-from | a, b | a, b |",
    ]


def test_a_soak_becomes_lines() -> None:
    step = {"seed": 2, "step": "quorum 0.9", "failing": 10, "asked": 50, "uploads": 40, "refused": 2, "seconds": 61.7}
    rows = [step | {"status": 1}, step | {"status": 1, "seed": 3, "refused": 4, "seconds": 70.2}]
    assert SCRIPT["soak_lines"]([*rows, step | {"status": 0, "uploads": 50}])[2:] == [
        "| quorum 0.9 | 2 | 50 | failed | 40 | 2 to 4 | 62 to 70 |",
        "| quorum 0.9 | 1 | 50 | completed | 50 | 2 | 62 |",
    ]


def test_a_demonstration_tells_what_it_took_and_no_path() -> None:
    config = {"model.name": "vit_base", "model.img-size": 224, "method": "fedavg", "partition.clients": 4}
    config |= {"out-dir": "/home/somebody", "resume-from": "/home/somebody/run"}
    result = {"bytes_up": [343_000_000, 343_400_000], "config": config, "accuracy": {"student": 10.0}}
    result |= {"fingerprint": "0123456789ab", "versions": {"python": "3.11.9"}, "machine": {"device": "cpu"}}
    peaks = {"flwr-serverapp": 1_234_000_000, "flower-superlink": 987_000_000, "flwr-clientapp": 2_500_000_000}
    said = demo.told(result, peaks, 123.21)
    assert "somebody" not in json.dumps(said)
    assert SCRIPT["memory_lines"]([said])[2:] == ["| vit_base, 224 px | fedavg | 4 | 343 | 1.23 | 0.99 | 2.50 | 123 |"]


def test_a_demonstration_passes_the_log_on_and_finds_the_run_folder(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    assert demo.passed_on([b"a\n", b"flower_run: run folder: /x y/z\n"]) == "/x y/z"
    assert demo.passed_on([b"a"]) == ""
    assert capfdbinary.readouterr().out == b"a\nflower_run: run folder: /x y/z\na"


def test_the_document_is_up_to_date_and_every_fault_was_tried() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert text == SCRIPT["document"]()
    for wanted in (
        "SuperNode killed",
        "ClientApp process killed",
        "client raises",
        "client slower than",
        "SuperLink restarted",
        "ServerApp killed while uploads come in",
        "ServerApp killed in inversion",
        "ServerApp killed in distillation",
        "disk of the run folder full",
        "Ray actor killed",
    ):
        assert wanted in text
