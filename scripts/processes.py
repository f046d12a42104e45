"""Processes that are started together and end together, and ports for them."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "FEDMITR_RUN"  # an environment variable that all processes of one run inherit
STOP_SECONDS = 15.0


def free_ports(count: int) -> list[int]:
    """Ports that are free now; nobody else is given them while the sockets are held."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def stop(processes: Sequence[subprocess.Popen[bytes]], mark: str) -> None:
    """End these processes, one after the other, and everything that they started: Flower's processes and Ray's.

    Args:
        processes: each the first of a session of its own.
        mark: what MARK is in their environment.
    """
    # Some of Ray's processes overwrite their environment with a title; their session tells whose they are.
    sessions = marked_sessions(mark) | {process.pid for process in processes}
    for process in processes:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _wait_until_gone(sessions, STOP_SECONDS / 3)  # they notice by themselves that it is gone, unless they are at work
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in in_sessions(sessions):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, kind)
        _wait_until_gone(sessions, STOP_SECONDS)


def marked_sessions(mark: str) -> set[int]:
    return {_session(pid) for pid in _processes() if _is_marked(pid, mark)} - {0}


def _wait_until_gone(sessions: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while in_sessions(sessions) and time.monotonic() < deadline:
        time.sleep(0.2)


def _processes() -> list[int]:
    """All that run now. Where there is no /proc, none are known."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def in_sessions(sessions: set[int]) -> list[int]:
    """Ids of the processes that run there now."""
    return [pid for pid in _processes() if _session(pid) in sessions]


def _session(pid: int) -> int:
    """The session of a process; 0 for one that has ended."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except (OSError, ValueError):
        return 0
    return 0 if state == "Z" else int(session)


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return False
