"""What `fedmitr simulate` shows of Flower's output: nothing but our own lines."""

import logging
from pathlib import Path

import pytest

from fedmitr_flwr.flower.shown import Shown

OURS = "INFO :      fedmitr: "
ACTOR = "(ClientAppActor pid=7) " + OURS


@pytest.fixture
def shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Shown:
    caplog.set_level(logging.INFO, "fedmitr")
    return Shown(tmp_path)


def test_noise_goes_to_the_log_and_our_own_lines_are_shown(
    shown: Shown, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a run"
    folder.mkdir()
    before = shown.log
    lines = [
        "\x1b[92mINFO \x1b[0m:      Starting Flower Simulation",
        "Successfully started run 42",
        "(pid=7) FutureWarning: Tip: In future versions of Ray",
        f"\x1b[92mINFO \x1b[0m:      fedmitr: run folder: {folder}",
        f"{ACTOR}digits, train split",
        f"{OURS}client 1: 0.03 MB on disk",
        "WARNING :   fedmitr: client 1 is unusual",
        OURS,
        f"{OURS}model   accuracy %",
        "(ClientAppActor pid=7) WARNING :   Manually terminating ClientAppActor",
    ]
    for line in lines:
        shown.line(line.encode() + b"\n")
    assert (shown.run_id, shown.folder, shown.bad_input) == ("42", str(folder), "")
    assert caplog.messages == [f"run folder: {folder}", f"log of Flower and Ray: {shown.log}", "client 1 is unusual"]
    assert shown.ending == ["", "model   accuracy %"]
    assert shown.log == folder / before.name
    assert not before.exists()
    kept = shown.log.read_text()
    assert "\x1b" not in kept
    assert len(kept.splitlines()) == len(lines)


def test_bad_input_that_the_server_app_finds_is_told_from_a_failure(
    shown: Shown, caplog: pytest.LogCaptureFixture
) -> None:
    shown.line(b"ERROR :     fedmitr: bad input: lr = 'x'\n")
    assert shown.bad_input == "lr = 'x'"
    assert not caplog.messages  # the run ends with it


def test_work_of_other_processes_is_shown_and_parts_of_clients_make_one_stage(
    shown: Shown, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[tuple[str, float, str]] = []
    monkeypatch.setattr(
        "fedmitr_flwr.common.progress.Progress.reach",
        lambda stage, done, said: reached.append((stage._label, done, said)),
    )
    for line in (
        f"{OURS}clients: 0/2 clients, 0 clients/s",
        f"{ACTOR}client 0: 1/4 epochs, loss=0.5, 2 epochs/s, 0:02 left",
        f"{ACTOR}client 1: 2/4 epochs, 5 epochs/min, 0:24 left",
        f"{OURS}clients: 2/2 clients, 1 clients/s, done in 0:02",
        f"{ACTOR}client 1: 4/4 epochs, 2 epochs/s, done in 0:02",
        f"{OURS}inversion 1/2: 5/9 image steps, loss=1, alive 44%, 2 image steps/s, 0:02 left",
        f"{OURS}scouting: 9/9 image steps, 9 image steps/s, done in 0:01",
    ):
        shown.line(line.encode())
    shown.close()
    assert reached == [
        ("clients", 0.0, ""),
        ("clients", 0.25, "loss=0.5"),
        ("clients", 0.75, ""),
        ("clients", 2.0, ""),
        ("inversion 1/2", 5.0, "loss=1, alive 44%"),
    ]
    assert [line.split(":")[0] for line in caplog.messages] == ["clients", "scouting", "inversion 1/2"]
