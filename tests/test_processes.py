"""Ending what was started together: all of it, and nothing of the terminal that it was started from."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmitr_flwr.flower import processes
from fedmitr_flwr.flower.processes import MARK, stop

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="without /proc no processes are known")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 1.5)


def a_process(mark: str, *, session: bool, code: str = "import time; time.sleep(60)") -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-S", "-c", code]
    return subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=session)


def test_a_process_of_our_own_session_is_left_alone() -> None:
    ours, theirs = a_process("one", session=False), a_process("one", session=True)
    try:
        time.sleep(0.3)  # until their environment can be read
        stop([], "one")
        assert theirs.wait(5) != 0
        assert ours.poll() is None
    finally:
        ours.kill()
        theirs.kill()
        ours.wait()


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    sleeps = "[sys.executable, '-S', '-c', 'import time; time.sleep(60)']"
    code = f"""
import pathlib, subprocess, sys
child = subprocess.Popen({sleeps}, env={{}})  # without the mark
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
child.wait()
"""
    process = a_process("two", session=True, code=code)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.05)
    stop([process], "two")
    grandchild = Path(f"/proc/{pid.read_text()}/stat")
    assert not grandchild.exists() or grandchild.read_text().rpartition(")")[2].split()[0] == "Z"
