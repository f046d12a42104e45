"""Studies over seeds: one that was stopped goes on behind the last finished seed, and nothing else is taken over."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # no package: it is where the script runs

import study

from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import versions


class Interrupted(Exception):
    pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a study of three seeds, whose row is the seed squared; gives the seeds that were computed."""
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    asked: list[int] = []

    def start(stop_at: int | None = None, seeds: str = "0,1,2") -> list[int]:
        def one_seed(seed: int) -> study.Part:
            asked.append(seed)
            if seed == stop_at:
                raise Interrupted
            return [{"seed": seed, "value": seed**2}], {"fingerprint": fingerprint(), "versions": versions()}

        arguments = ["squares.py", "--seeds", seeds, "--jobs", "1", "--json", str(tmp_path / "squares.json")]
        monkeypatch.setattr(sys, "argv", arguments)
        asked.clear()
        if stop_at is None:
            study.run("squares.py", None, one_seed)
        else:
            with pytest.raises(Interrupted):
                study.run("squares.py", None, one_seed)
        return sorted(set(asked))

    return start


def rows(folder: Path) -> list[tuple[int, int]]:
    return [(row["seed"], row["value"]) for row in json.loads((folder / "squares.json").read_text())["rows"]]


def test_a_stopped_study_goes_on_behind_its_last_finished_seed(run: Any, tmp_path: Path) -> None:
    run(stop_at=1)
    assert rows(tmp_path) == [(0, 0)]
    assert run() == [1, 2]
    assert rows(tmp_path) == [(0, 0), (1, 1), (2, 4)]


def test_a_study_that_ended_is_made_anew(run: Any, tmp_path: Path) -> None:
    run()
    assert run() == [0, 1, 2]
    assert rows(tmp_path) == [(0, 0), (1, 1), (2, 4)]


@pytest.mark.parametrize("changed", ["fingerprint", "command", "scripts", "versions"])
def test_nothing_is_taken_from_other_code_versions_or_another_command(run: Any, tmp_path: Path, changed: str) -> None:
    run(stop_at=1)
    file = tmp_path / "squares.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {changed: "another"}))
    assert run() == [0, 1, 2]
