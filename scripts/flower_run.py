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
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from processes import MARK, free_ports, quiet, stop, wait_until_up  # noqa: E402

from fedmitr_flwr.cli import Once  # noqa: E402 - the checkout's own, whether installed or not
from fedmitr_flwr.common.errors import ConfigError, UserError, printable  # noqa: E402
from fedmitr_flwr.common.process import NO_HOME, begin, homeless  # noqa: E402
from fedmitr_flwr.config import Config  # noqa: E402
from fedmitr_flwr.config.text import option_hint, read_settings  # noqa: E402
from fedmitr_flwr.data.layout import found_source  # noqa: E402

START_SECONDS, LOST_SECONDS = 60.0, 300.0
BAD_INPUT = "bad input: "  # before what the ServerApp says of settings, data or weights that cannot be


@dataclass
class Seen:
    """What Flower's log has told of the run."""

    run_id: str = ""
    folder: str = ""
    bad_input: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 after a completed run, 1 after a failed one, 2 after bad input, 130 after Ctrl-C, 141 if unread."""
    begin()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    options, seen, config = argparse.Namespace(superlink=None), Seen(), None
    try:
        options = _parse(argv)
        config = settings(options)
        check(config, options)
        link = there_already() if options.superlink else super_link(options, config)
        with tempfile.TemporaryDirectory(prefix="fedmitr-") as scratch, link as environment:
            run_file = Path(scratch) / "run.toml"
            run_file.write_text(config.to_toml(), encoding="utf-8")
            run(environment, run_file, options, seen)
        return 0
    except UserError as error:
        return _complain(str(error), 2)
    except RuntimeError as error:
        if homeless(error):
            return _complain(NO_HOME, 2)
        return _complain(str(error), 2 if seen.bad_input else 1)
    except KeyboardInterrupt:
        return _complain(_interrupted(seen, options.superlink, config), 130)
    except BrokenPipeError:  # nobody reads what it prints any longer, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
        return 141


def _interrupt(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):  # its reader may have left
        os.write(2, b"flower_run: interrupted; ending what it has started\n")  # at once: what follows takes seconds
    raise KeyboardInterrupt


def _interrupted(seen: Seen, superlink: str | None, config: Config | None) -> str:
    """The last line: where the run is, and how it goes on."""
    if superlink:
        run_id = seen.run_id or "RUN"
        return (
            f"interrupted; the run goes on at {superlink}: `flwr log {run_id} {superlink}` shows it, "
            f"`flwr stop {run_id} {superlink}` ends it"
        ) + (f"; its run folder: {seen.folder}" if seen.folder else "")
    folder = seen.folder or _made(seen, config)
    if not folder:
        return "interrupted, before there was a run folder; start it again"
    resumes = config is not None and config.flower.strategy == "oneshot"
    how = f"the same command goes on with resume-from={folder}" if resumes else "start it again"
    return f"interrupted; {how} (run folder: {folder})"


def _made(seen: Seen, config: Config | None) -> str:
    """The run folder that is there, but of which Flower's log, which comes late, has not told yet."""
    if config is None or not seen.run_id:
        return ""
    what = config.method if config.flower.strategy == "oneshot" else config.flower.strategy
    folder = Path(config.out_dir or "~/fedmitr-runs").expanduser() / f"{what}-{seen.run_id}"
    return str(folder) if folder.is_dir() else ""


def _complain(text: str, status: int) -> int:
    print("flower_run: error:", printable(" ".join(text.split())), file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other bad input; what is no option may be meant as a setting."""
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        words = [*sys.argv[1:], ""]
        at = words.index(unknown[1]) + 1 if unknown and unknown[1] in words else len(words)
        hint = option_hint(unknown[1], words[at:], Config().to_flat()) if unknown else ""
        raise ConfigError(f"{message}{hint or '; see --help'}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", type=Path, action=Once, metavar="FILE", help="settings in TOML")
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
    flat = read_settings(options.config, options.settings, Config().to_flat())
    if options.clients is not None:
        said = read_settings(None, options.settings, Config().to_flat()).get("partition.clients", options.clients)
        if said != options.clients:
            raise ConfigError(f"--clients {options.clients} and partition.clients={said}; give one of them")
        flat["partition.clients"] = options.clients
    try:
        return Config.from_flat(flat)
    except ConfigError as error:
        file = f" (with the settings of {options.config})" if options.config else ""
        raise ConfigError(f"{error}{file}") from error


def check(config: Config, options: argparse.Namespace) -> None:
    """Raise UserError for what is wrong with the run and can be seen without a node.

    At a SuperLink that is there already, data and devices are those of its machine: there, only settings are looked at.
    """
    from fedmitr_flwr.client.private import require_opacus
    from fedmitr_flwr.common.compute import resolve_device
    from server_app.checks import prepared, require_possible

    require_possible(config)
    if not options.superlink:
        if config.partition.scheme == "own":
            raise ConfigError(
                "partition.scheme = 'own' is for SuperNodes with images of their own; name their --superlink"
            )
        if options.client_gpus < 0:
            raise ConfigError(f"--client-gpus {options.client_gpus:g} is not possible; use a number >= 0")
        if options.client_gpus:  # or Flower would wait for one
            resolve_device("cuda")
        require_opacus(config)
        prepared(config)


def environment_for(options: argparse.Namespace, config: Config, ports: Sequence[int]) -> dict[str, str]:
    """What Flower and Ray must be told before they start; the SuperLink hands it to everything that it starts."""
    hub = found_source(config.data).source == "hub" or config.model.weights == "timm"
    return {
        **os.environ,
        **quiet(),
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


@contextlib.contextmanager
def there_already() -> Iterator[dict[str, str]]:
    """Nothing to start and nothing to stop; gives the environment for Flower's commands."""
    yield {**os.environ, **quiet()}


@contextlib.contextmanager
def super_link(options: argparse.Namespace, config: Config) -> Iterator[dict[str, str]]:
    """A SuperLink of our own, as `flwr run` would start it, for as long as the block lasts; gives its environment."""
    port, control = free_ports(2)
    environment = environment_for(options, config, (port, control))
    home = Path(environment["FLWR_HOME"])
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--flwr-home: cannot make the folder {home}: {error.strerror}; name another") from error
    with ray_folder(environment):
        log = home / f"superlink-{port}.log"
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
        with log.open("wb") as output:
            process = subprocess.Popen(  # its own session: Ctrl-C reaches only us, and we stop it in good order
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        failed, at_once = False, True
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}", log, START_SECONDS)
            yield environment
            at_once = False
        except RuntimeError:
            failed, at_once = True, False
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave them behind
            stop([process], environment[MARK], at_once=at_once)
            if failed:
                print(f"flower_run: the SuperLink's log is kept, since the run failed: {log}", flush=True)
            else:
                log.unlink()


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


def run(environment: dict[str, str], run_file: Path, options: argparse.Namespace, seen: Seen) -> None:
    """Submit the app and show its log, from which `seen` learns.

    Raises:
        RuntimeError: the run did not complete. It says what Flower says of it.
    """
    link = [options.superlink] if options.superlink else []
    command = ["flwr", "run", str(ROOT), *link, "-c", str(run_file), "--stream"]
    if not link:
        clients = Config.from_file(run_file).partition.clients
        resources = f"client-resources-num-cpus=1 client-resources-num-gpus={options.client_gpus}"
        command += ["--federation-config", f"num-supernodes={clients} {resources}"]
    _follow(command, environment, seen)
    run_id = seen.run_id
    if not run_id:
        raise RuntimeError("Flower did not take the run; see above")
    status, details = _status(run_id, link, environment)
    if not status.startswith("finished") and link:
        print(f"flower_run: the log broke off (status: {status}); the run may go on, and is waited for", flush=True)
        status, details = _wait_for_end(run_id, link, environment)
        _follow(["flwr", "log", run_id, *link, "--show"], environment, seen)
    print(f"flower_run: run {run_id}: {status}")
    if seen.folder:
        print(f"flower_run: run folder: {seen.folder}", flush=True)
    if status != "finished:completed":
        raise RuntimeError(details or "Flower gives no reason; see above")


def _follow(command: Sequence[str], environment: dict[str, str], seen: Seen) -> None:
    """Show what one of Flower's commands says, until it ends."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            _show(process.stdout, seen)
        except BaseException:
            process.kill()  # it only shows the log; or leaving the block would wait for the end of the run
            raise


def _show(stream: IO[bytes], seen: Seen) -> None:
    """Pass Flower's output on as it comes, and pick out of it what is needed at the end."""
    for line in stream:
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if found := re.search(rb"Successfully started run (\d+)", line):
            seen.run_id = found[1].decode()
        if found := re.search(rb"run folder: (.+)", line):
            seen.folder = found[1].decode(errors="replace").strip()
        seen.bad_input |= BAD_INPUT.encode() in line


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
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # Python's own end takes seconds, or half a minute on a busy machine, once torch is loaded
