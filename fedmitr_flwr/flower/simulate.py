"""`flwr run` of this app, checked: it ends well only for a completed run, and leaves nothing running.

It starts a SuperLink of its own (own ports, own FLWR_HOME), runs the app on simulated clients, shows its stages, asks
Flower how the run ended, and stops what it started, also after Ctrl-C. What Flower and Ray say goes to a log file. With
`superlink` the app runs on the SuperNodes of a SuperLink that is there already; that one is left as it is, and there a
run goes on after Ctrl-C.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import ConfigError, Failed
from ..common.files import absolute
from ..common.outside import short
from ..common.progress import EVERY, on_screen
from ..common.shipped import INSIDE, PACKAGE, shipped
from ..config import Config
from ..config.sections import ONE_SHOT
from ..data.layout import found_source
from ..runs.folder import HOME
from .processes import MARK, free_ports, quiet, stop, wait_until_up
from .shown import Shown

START_SECONDS, LOST_SECONDS = 60.0, 300.0
log = logging.getLogger("fedmitr")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of the command line: a connection of Flower's config.toml, or how to simulate."""

    superlink: str | None = None
    client_gpus: float = 0.0
    flwr_home: Path = HOME / ".flwr"
    offline: bool = False


def simulate(config: Config, options: Options) -> None:
    """Check the settings, run, and show the stages and what the run ends with.

    Raises:
        UserError: the settings cannot be. Nothing was started.
        Failed: the run did not complete.
        KeyboardInterrupt: it was interrupted; the text says how it goes on.
    """
    log.setLevel(logging.ERROR)  # all that the check logs comes again, from the ServerApp
    check(config, options)
    log.setLevel(logging.INFO)
    home = absolute(options.flwr_home, "--flwr-home")
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--flwr-home: cannot make the folder {home}: {error.strerror}; name another") from error
    seen = Shown(home)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    link = there_already() if options.superlink else super_link(config, options, seen.log)
    try:
        with on_screen(), tempfile.TemporaryDirectory(prefix="fedmitr-") as scratch, link as environment:
            run_file = Path(scratch) / "run.toml"
            run_file.write_text(config.to_toml(), encoding="utf-8")
            run(app_in(Path(scratch) / "fedmitr-flwr"), environment, run_file, options, seen)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(seen, options.superlink, config)) from None
    print(*seen.ending, sep="\n")


def _interrupt(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):  # its reader may have left
        os.write(2, b"fedmitr: interrupted; ending what it has started\n")  # at once: what follows takes seconds
    raise KeyboardInterrupt


def _interrupted(seen: Shown, superlink: str | None, config: Config) -> str:
    """Where the run is, and how it goes on."""
    if superlink:
        run_id = seen.run_id or "RUN"
        return (
            f"the run goes on at {superlink}: `flwr log {run_id} {superlink}` shows it, "
            f"`flwr stop {run_id} {superlink}` ends it"
        ) + (f"; its run folder: {seen.folder}" if seen.folder else "")
    folder = seen.folder or _made(seen, config)
    if not folder:
        return "before there was a run folder; start it again"
    if not seen.folder:
        seen.begin(folder)
    resumes = config.flower.strategy == ONE_SHOT
    how = f"the same command goes on with resume-from={folder}" if resumes else "start it again"
    return f"{how} (run folder: {folder})"


def _made(seen: Shown, config: Config) -> str:
    """The run folder that is there, but of which Flower's log, which comes late, has not told yet."""
    if not seen.run_id:
        return ""
    what = short(config.method) if config.flower.strategy == ONE_SHOT else config.flower.strategy
    folder = Path(config.out_dir or HOME).expanduser() / f"{what}-{seen.run_id}"
    return str(folder) if folder.is_dir() else ""


def check(config: Config, options: Options) -> None:
    """Raise UserError for what is wrong with the run and can be seen without a node.

    At a SuperLink that is there already, data and devices are those of its machine: there, only settings are looked at.
    """
    from ..client.private import require_opacus
    from ..common.compute import resolve_device
    from .checks import prepared, require_possible

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


def app_in(folder: Path) -> Path:
    """The app as Flower bundles it, from the checkout or from the installed package; gives its folder."""
    ignored = shutil.ignore_patterns("__pycache__", INSIDE)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)
    for name in ("fedmitr_ray", "server_app", "client_app"):
        shutil.copytree(shipped(name), folder / name, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(shipped(name), folder)
    return folder


def environment_for(config: Config, options: Options, ports: Sequence[int]) -> dict[str, str]:
    """What Flower and Ray must be told before they start; the SuperLink hands it to everything that it starts."""
    hub = found_source(config.data).source == "hub" or config.model.weights == "timm"
    return {
        **os.environ,
        **quiet(),
        "FLWR_HOME": str(absolute(options.flwr_home, "--flwr-home")),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # everything is installed, and there may be no network
        "RAY_USAGE_STATS_ENABLED": "0",
        EVERY: "1",  # seconds: `Shown` hears of the work by its lines
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
def super_link(config: Config, options: Options, log: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of our own, as `flwr run` would start it, for as long as the block lasts; gives its environment.

    What it says goes to the file `log`.
    """
    port, control = free_ports(2)
    environment = environment_for(config, options, (port, control))
    home = Path(environment["FLWR_HOME"])
    with ray_folder(environment):
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
        with log.open("ab") as output:
            process = subprocess.Popen(  # its own session: Ctrl-C reaches only us, and we stop it in good order
                command, cwd=home, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        at_once = True
        try:
            wait_until_up(process, f"http://127.0.0.1:{port}", log, START_SECONDS)
            yield environment
            at_once = False
        except RuntimeError:
            at_once = False
            raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave them behind
            stop([process], environment[MARK], at_once=at_once)


@contextlib.contextmanager
def ray_folder(environment: dict[str, str]) -> Iterator[None]:
    """A short folder of our own for Ray: its sockets' paths may have 107 characters, and its logs pile up."""
    if "RAY_TMPDIR" in environment:
        yield
        return
    short_path = tempfile.mkdtemp(prefix="fm", dir="/tmp" if Path("/tmp").is_dir() else None)
    environment["RAY_TMPDIR"] = short_path
    try:
        yield
    finally:
        shutil.rmtree(short_path, ignore_errors=True)


def run(app: Path, environment: dict[str, str], run_file: Path, options: Options, seen: Shown) -> None:
    """Submit the app and follow its log, from which `seen` learns.

    Raises:
        Failed: the run did not complete. It says what Flower says of it, and where the log is.
    """
    link = [options.superlink] if options.superlink else []
    command = ["flwr", "run", str(app), *link, "-c", str(run_file), "--stream"]
    if not link:
        clients = Config.from_file(run_file).partition.clients
        resources = f"client-resources-num-cpus=1 client-resources-num-gpus={options.client_gpus}"
        command += ["--federation-config", f"num-supernodes={clients} {resources}"]
    _follow(command, environment, seen)
    run_id = seen.run_id
    if not run_id:
        raise Failed(f"Flower did not take the run; see {seen.log}")
    status, details = _status(run_id, link, environment)
    if not status.startswith("finished") and link:
        log.warning("the log broke off (status: %s); the run may go on, and is waited for", status)
        status, details = _wait_for_end(run_id, link, environment)
        seen.ending.clear()  # all is said again
        _follow(["flwr", "log", run_id, *link, "--show"], environment, seen)
    if status != "finished:completed":
        reason = f"{seen.bad_input or details or f'Flower gives no reason ({status})'}"
        raise Failed(f"{reason}; see {seen.log}", 2 if seen.bad_input else 1)


def _follow(command: Sequence[str], environment: dict[str, str], seen: Shown) -> None:
    """Take what one of Flower's commands says, until it ends."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                seen.line(line)
        except BaseException:
            process.kill()  # it only shows the log; or leaving the block would wait for the end of the run
            raise
        finally:
            seen.close()


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
    listed = subprocess.run(command, env=environment, capture_output=True, text=True)
    try:
        entry: dict[str, Any] = json.loads(listed.stdout)["runs"][0]
    except (ValueError, KeyError, IndexError):
        return "unknown", f"`flwr list` says: {listed.stdout[-300:]}"
    return str(entry.get("status")), str(entry.get("status-details") or "")
