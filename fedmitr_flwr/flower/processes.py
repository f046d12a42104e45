"""Processes that are started together and end together: their environment, their ports, and the wait for the first."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Sequence
from pathlib import Path

from ..common.errors import Failed

MARK = "FEDMITR_RUN"  # an environment variable that all processes of one run inherit
STOP_SECONDS = 15.0
LEAST_SECONDS = 1.0  # between being told to end and being ended, after Ctrl-C


def quiet() -> dict[str, str]:
    """What lets Flower's commands of this Python be found, and tell nobody that they ran."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def wait_until_up(
    link: subprocess.Popen[bytes], address: str, log: Path, seconds: float, *handlers: urllib.request.BaseHandler
) -> None:
    """Wait until a SuperLink answers.

    Raises:
        Failed: it does not, or has ended. Its log is named.
    """
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and link.poll() is None:
        try:
            with direct.open(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise Failed(f"the SuperLink did not start; see {log}")


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


def stop(processes: Sequence[subprocess.Popen[bytes]], mark: str, *, at_once: bool = False) -> None:
    """End these processes, one after the other, and everything that they started: Flower's processes and Ray's.

    Args:
        processes: each the first of a session of its own.
        mark: what MARK is in their environment.
        at_once: end all of them now, in whatever they are at: what they have written is whole or absent.
    """
    # Some of Ray's processes overwrite their environment with a title; their session tells whose they are. Ours, with
    # the terminal that we run in, is never theirs.
    sessions = {session_of(pid) for pid in marked(f"{MARK}={mark}")} - {0, os.getsid(0)}
    sessions |= {process.pid for process in processes}
    if not at_once:
        for process in processes:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        _wait_until_gone(sessions, STOP_SECONDS / 3)  # they notice by themselves that it is gone, unless they work
    for kind, seconds in ((signal.SIGTERM, LEAST_SECONDS if at_once else STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        for pid in of_sessions(sessions):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, kind)
        _wait_until_gone(sessions, seconds)
    for process in processes:
        process.kill()  # where there is no /proc, only these are known
        process.wait()


def marked(*entries: str) -> list[int]:
    """Ids of the processes with all these entries in their environment; not of Ray's."""
    wanted = {entry.encode() for entry in entries}
    return [pid for pid in _processes() if wanted <= set(_read(pid, "environ").split(b"\0"))]


def of_sessions(sessions: Collection[int]) -> list[int]:
    """Ids of their processes."""
    return [pid for pid in _processes() if session_of(pid) in sessions]


def session_of(pid: int) -> int:
    """The session of a process; 0 for one that has ended."""
    state, _, _, session = (_read(pid, "stat").rpartition(b")")[2].split() or [b"Z", b"", b"", b"0"])[:4]
    return 0 if state == b"Z" else int(session)


def command_of(pid: int) -> str:
    """The command line of a process, or the title that it has given itself; "" for one that has ended."""
    return _read(pid, "cmdline").decode(errors="replace")


def _wait_until_gone(sessions: Collection[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while of_sessions(sessions) and time.monotonic() < deadline:
        time.sleep(0.2)


def _processes() -> list[int]:
    """All that run now. Where there is no /proc, none are known."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return b""
