#!/usr/bin/env python3
"""`flwr run` of this app, checked: exit status 0 only for a completed run, and nothing left running afterwards.

It starts a SuperLink of its own (own ports, own FLWR_HOME), runs the app on simulated clients, streams the log, asks
Flower how the run ended, and stops what it started, also after Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fedmitr_flwr.config import Config  # noqa: E402 - the checkout's own, whether installed or not
from fedmitr_flwr.errors import UserError  # noqa: E402
from fedmitr_flwr.settings import parse_assignment, read_flat  # noqa: E402

MARK = "FEDMITR_RUN"  # an environment variable that all processes of one run inherit
START_SECONDS, STOP_SECONDS = 60.0, 15.0
# Settings that are paths, with their values that are none. On the command line they are relative to where one stands.
PATHS = {
    "out-dir": (),
    "resume-from": (),
    "data.path": (),
    "model.weights": ("none", "timm"),
    "distill.pretrained": ("timm",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 after a completed run, 1 after a failed one, 2 after bad input, 130 after Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    try:
        options = _parse(argv)
        config = settings(options)
        with tempfile.TemporaryDirectory(prefix="fedmitr-") as scratch, super_link(options, config) as environment:
            run_file = Path(scratch) / "run.toml"
            run_file.write_text(config.to_toml(), encoding="utf-8")
            return run(environment, run_file, options)
    except UserError as error:
        return _complain(str(error), 2)
    except RuntimeError as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _complain(text: str, status: int) -> int:
    print("flower_run: error:", " ".join(text.split()), file=sys.stderr)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="settings in TOML")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings; they win over the file's")
    parser.add_argument("--clients", type=int, metavar="K", help="simulated clients (default: partition.clients)")
    parser.add_argument("--client-gpus", type=float, default=0.0, metavar="G", help="share of a GPU per client")
    parser.add_argument("--flwr-home", type=Path, default=ROOT / ".flwr", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face hub")
    return parser.parse_intermixed_args(argv)


def settings(options: argparse.Namespace) -> Config:
    """The file's settings under those of the command line.

    Raises:
        ConfigError: a file that cannot be read, or a key or value that is not possible. It is named.
    """
    flat = read_flat(options.config) if options.config else {}
    for word in options.settings:
        key, value = parse_assignment(word)
        if isinstance(value, str) and value and key in PATHS and value not in PATHS[key]:
            value = str(Path(value).expanduser().absolute()) if _is_local(key, value) else value
        flat[key] = value
    if options.clients is not None:
        flat["partition.clients"] = options.clients
    return Config.from_flat(flat)


def _is_local(key: str, value: str) -> bool:
    """A data set of the hub is named like a relative path; it is a path if there is one."""
    return key != "data.path" or Path(value).expanduser().exists()


def environment_for(options: argparse.Namespace, config: Config, ports: Sequence[int]) -> dict[str, str]:
    """What Flower and Ray must be told before they start; the SuperLink hands it to everything that it starts."""
    hub = config.data.source == "hub" or config.model.weights == "timm"
    hub |= config.distill.init == "pretrained" and config.distill.pretrained == "timm"
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(options.flwr_home.expanduser().resolve()),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # everything is installed, and there may be no network
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # "client 1: ..." and "client 2: ..." are no duplicates
        "PYTHONUNBUFFERED": "1",
        # Threads that wait in a loop take the cores from those that work as soon as anything else runs here.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        MARK: uuid.uuid4().hex,
        **({"HF_HUB_OFFLINE": "1"} if options.offline or not hub else {}),
    }


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


@contextlib.contextmanager
def super_link(options: argparse.Namespace, config: Config) -> Iterator[dict[str, str]]:
    """A SuperLink of our own, as `flwr run` would start it, for as long as the block lasts; gives its environment."""
    environment = environment_for(options, config, free_ports(2))
    home = Path(environment["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with ray_folder(environment):
        log = home / f"superlink-{environment['FLWR_LOCAL_SUPERLINK_HTTP_API_PORT']}.log"
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        command += ["--port", environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]]
        command += ["--control-api-address", f"127.0.0.1:{environment['FLWR_LOCAL_CONTROL_API_PORT']}"]
        with log.open("wb") as output:
            process = subprocess.Popen(  # its own session: Ctrl-C reaches only us, and we stop it in good order
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            _wait_until_up(process, environment, log)
            yield environment
        finally:
            stop(process, environment[MARK])
        log.unlink()  # kept where the block raised


@contextlib.contextmanager
def ray_folder(environment: dict[str, str]) -> Iterator[None]:
    """A short folder of our own for Ray: its sockets' paths may have 107 characters, and its logs pile up."""
    if "RAY_TMPDIR" in environment:
        yield
        return
    short = tempfile.mkdtemp(prefix="fm", dir="/tmp" if Path("/tmp").is_dir() else None)
    environment["RAY_TMPDIR"] = short
    try:
        yield
    finally:
        shutil.rmtree(short, ignore_errors=True)


def _wait_until_up(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    url = f"http://127.0.0.1:{environment['FLWR_LOCAL_SUPERLINK_HTTP_API_PORT']}/health"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(url, timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the SuperLink did not start; see {log}")


def run(environment: dict[str, str], run_file: Path, options: argparse.Namespace) -> int:
    """Submit the app, show its log, and return the exit status that tells how it ended."""
    clients = Config.from_file(run_file).partition.clients
    federation = f"num-supernodes={clients} client-resources-num-cpus=1 client-resources-num-gpus={options.client_gpus}"
    command = ["flwr", "run", str(ROOT), "-c", str(run_file), "--federation-config", federation, "--stream"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            run_id, folder = _show(process.stdout)
        except BaseException:
            process.terminate()  # or leaving the block would wait for the end of the run
            raise
    if not run_id:
        return _complain("Flower did not take the run; see above", process.returncode or 1)
    listed = subprocess.run(
        ["flwr", "list", "--run-id", run_id, "--format", "json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    status, details = _status(listed.stdout)
    print(f"flower_run: run {run_id}: {status}")
    if folder:
        print(f"flower_run: run folder: {folder}", flush=True)
    return 0 if status == "finished:completed" else _complain(details or "Flower gives no reason; see above", 1)


def _show(stream: IO[bytes]) -> tuple[str, str]:
    """Pass Flower's output on as it comes, and pick the run's id and folder out of it."""
    run_id = folder = ""
    for line in stream:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if found := re.search(rb"Successfully started run (\d+)", line):
            run_id = found[1].decode()
        if found := re.search(rb"run folder: (.+)", line):
            folder = found[1].decode(errors="replace").strip()
    return run_id, folder


def _status(listed: str) -> tuple[str, str]:
    try:
        entry: dict[str, Any] = json.loads(listed)["runs"][0]
    except (ValueError, KeyError, IndexError):
        return "unknown", f"`flwr list` says: {listed[-300:]}"
    return str(entry.get("status")), str(entry.get("status-details") or "")


def stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the SuperLink and everything that it started: Flower's processes and Ray's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave them behind
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Some of Ray's processes overwrite their environment with a title; their session tells whose they are.
    sessions = {_session(pid) for pid in _processes() if _is_marked(pid, mark)} | {process.pid}
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _wait_until_gone(sessions, STOP_SECONDS / 3)  # they notice by themselves that it is gone, unless they are at work
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for pid in _in(sessions):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, kind)
        _wait_until_gone(sessions, STOP_SECONDS)


def _wait_until_gone(sessions: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _in(sessions) and time.monotonic() < deadline:
        time.sleep(0.2)


def _processes() -> list[int]:
    """All that run now. Where there is no /proc, none are known."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def _in(sessions: set[int]) -> list[int]:
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


if __name__ == "__main__":
    sys.exit(main())
