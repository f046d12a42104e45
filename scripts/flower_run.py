#!/usr/bin/env python3
"""`flwr run` of this app, checked: exit status 0 only for a completed run, and nothing left running afterwards.

It starts a SuperLink of its own (own ports, own FLWR_HOME), runs the app on simulated clients, streams the log, asks
Flower how the run ended, and stops what it started, also after Ctrl-C. With --superlink the app runs on the SuperNodes
of a SuperLink that is there already; that one is left as it is, and there a run goes on after Ctrl-C.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
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
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from processes import MARK, free_ports, stop  # noqa: E402

from fedmitr_flwr.config import Config  # noqa: E402 - the checkout's own, whether installed or not
from fedmitr_flwr.data.layout import found_source  # noqa: E402
from fedmitr_flwr.errors import UserError  # noqa: E402
from fedmitr_flwr.settings import parse_assignment, read_flat  # noqa: E402

START_SECONDS, LOST_SECONDS = 60.0, 300.0
_GOES_ON = "; the run goes on at {0}: `flwr log RUN {0}` shows it, `flwr stop RUN {0}` ends it"
# Settings that are paths, with their values that are none. On the command line they are relative to where one stands.
PATHS = {
    "out-dir": (),
    "resume-from": (),
    "data.path": (),
    "feddf.path": (),
    "model.weights": ("none", "timm"),
    "distill.pretrained": ("timm",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 after a completed run, 1 after a failed one, 2 after bad input, 130 after Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    options = _parse(argv)
    try:
        config = settings(options)
        link = there_already() if options.superlink else super_link(options, config)
        with tempfile.TemporaryDirectory(prefix="fedmitr-") as scratch, link as environment:
            run_file = Path(scratch) / "run.toml"
            run_file.write_text(config.to_toml(), encoding="utf-8")
            run(environment, run_file, options)
        return 0
    except UserError as error:
        return _complain(str(error), 2)
    except RuntimeError as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        return _complain("interrupted" + _GOES_ON.format(options.superlink) * bool(options.superlink), 130)


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
    parser.add_argument("--superlink", metavar="NAME", help="a connection of Flower's config.toml, for real SuperNodes")
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
    hub = found_source(config.data).source == "hub" or config.model.weights == "timm"
    hub |= config.distill.init == "pretrained" and config.distill.pretrained == "timm"
    return {
        **os.environ,
        **_quiet(),
        "FLWR_HOME": str(options.flwr_home.expanduser().resolve()),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # everything is installed, and there may be no network
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # "client 1: ..." and "client 2: ..." are no duplicates
        # Threads that wait in a loop take the cores from those that work as soon as anything else runs here.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        MARK: uuid.uuid4().hex,
        **({"HF_HUB_OFFLINE": "1"} if options.offline or not hub else {}),
    }


def _quiet() -> dict[str, str]:
    """Flower's commands of this Python are found, and tell nobody that they ran."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def there_already() -> Iterator[dict[str, str]]:
    """Nothing to start and nothing to stop; gives the environment for Flower's commands."""
    yield {**os.environ, **_quiet()}


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
            try:
                yield environment
            except RuntimeError:
                print(f"flower_run: the SuperLink's log is kept: {log}", flush=True)
                raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave them behind
            stop([process], environment[MARK])
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


def run(environment: dict[str, str], run_file: Path, options: argparse.Namespace) -> None:
    """Submit the app and show its log.

    Raises:
        RuntimeError: the run did not complete. It says what Flower says of it.
    """
    link = [options.superlink] if options.superlink else []
    command = ["flwr", "run", str(ROOT), *link, "-c", str(run_file), "--stream"]
    if not link:
        clients = Config.from_file(run_file).partition.clients
        resources = f"client-resources-num-cpus=1 client-resources-num-gpus={options.client_gpus}"
        command += ["--federation-config", f"num-supernodes={clients} {resources}"]
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
        raise RuntimeError("Flower did not take the run; see above")
    status, details = _status(run_id, link, environment)
    if not status.startswith("finished") and link:
        print(f"flower_run: the log broke off (status: {status}); the run may go on, and is waited for", flush=True)
        status, details = _wait_for_end(run_id, link, environment)
        with subprocess.Popen(
            ["flwr", "log", run_id, *link, "--show"], env=environment, stdout=subprocess.PIPE
        ) as again:
            assert again.stdout is not None
            _, folder = _show(again.stdout)
    print(f"flower_run: run {run_id}: {status}")
    if folder:
        print(f"flower_run: run folder: {folder}", flush=True)
    if status != "finished:completed":
        raise RuntimeError(details or "Flower gives no reason; see above")


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


def _wait_for_end(run_id: str, link: Sequence[str], environment: dict[str, str]) -> tuple[str, str]:
    """Until the run has ended, or its SuperLink has been silent for too long."""
    heard = time.monotonic()
    while True:
        status, details = _status(run_id, link, environment)
        if status != "unknown":
            heard = time.monotonic()
        if status.startswith("finished") or time.monotonic() - heard > LOST_SECONDS:
            return status, details
        time.sleep(2)


def _status(run_id: str, link: Sequence[str], environment: dict[str, str]) -> tuple[str, str]:
    command = ["flwr", "list", *link, "--run-id", run_id, "--format", "json"]
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    try:
        entry: dict[str, Any] = json.loads(listed.stdout)["runs"][0]
    except (ValueError, KeyError, IndexError):
        return "unknown", f"`flwr list` says: {listed.stdout[-300:]}"
    return str(entry.get("status")), str(entry.get("status-details") or "")


if __name__ == "__main__":
    sys.exit(main())
