"""A whole federation on this machine's loopback, started by the scripts that also start one on many machines.

Each SuperNode has a folder of its own, with its key, its FLWR_HOME and its log, as it would have on its own machine.
"""

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from fedmitr_flwr.flower.processes import MARK, command_of, free_ports, marked, quiet, stop, wait_until_up  # noqa: E402

NAME = "federation"  # of the connection in Flower's config.toml
START_SECONDS = 120.0


class Federation:
    """A SuperLink and its SuperNodes; leaving the block ends them all."""

    def __init__(self, folder: Path, show: bool = False) -> None:
        """Prepare one in an empty folder; with `show`, every command is printed."""
        self.folder, self.show = folder, show
        self.mark = uuid.uuid4().hex
        (self.port,) = free_ports(1)
        self.credentials = folder / "credentials"
        self.link: subprocess.Popen[bytes] | None = None
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._starts: dict[str, tuple[Path, int]] = {}

    def __enter__(self) -> Self:
        self.call("sh", HERE / "credentials.sh", "ca", self.credentials)
        self.call("sh", HERE / "credentials.sh", "server", self.credentials, "localhost")
        home = self.folder / "operator"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.credentials / "ca.crt"}"\n'
        )
        try:
            self.start_link()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """SuperNodes first, so that they can say goodbye."""
        stop([*self.nodes.values(), *([self.link] if self.link else [])], self.mark)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self, who: str) -> dict[str, str]:
        """Of the operator, the server or a client, each of which has Flower's files in a folder of its own."""
        return {**os.environ, **quiet(), "FLWR_HOME": str(self.folder / who), MARK: self.mark}

    def call(self, *command: str | Path) -> str:
        """Run one command to its end, as the operator; gives its output.

        Raises:
            RuntimeError: it failed.
        """
        self._print(command)
        done = subprocess.run(
            [str(word) for word in command], env=self.environment("operator"), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed: {' '.join((done.stdout + done.stderr).split())}")
        return done.stdout

    def start_link(self) -> None:
        """Start the SuperLink, also again: its database is kept."""
        words = [self.credentials, self.folder / "server", "127.0.0.1", str(self.port)]
        self.link = self._start("server", ["sh", HERE / "superlink.sh", *words])
        trust = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self.credentials / "ca.crt"))
        wait_until_up(self.link, f"https://{self.address}", self.log_of("server"), START_SECONDS, trust)

    def add(self, name: str, images: Path) -> None:
        """Make a client's key, register it, and start its SuperNode."""
        self.call("sh", HERE / "credentials.sh", "node", self.folder / name, name)
        (self.folder / name / "ca.crt").write_bytes((self.credentials / "ca.crt").read_bytes())
        self.call("flwr", "supernode", "register", self.folder / name / f"{name}.pub", NAME)
        (port,) = free_ports(1)
        self._starts[name] = (images, port)
        self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start a SuperNode that was added, also again."""
        images, port = self._starts[name]
        words = [self.folder / name, self.address, name, images, str(port)]
        self.nodes[name] = self._start(name, ["sh", HERE / "supernode.sh", *words])

    def _start(self, who: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        self._print([*command, "&"])
        (self.folder / who).mkdir(exist_ok=True)
        with self.log_of(who).open("ab") as log:
            return subprocess.Popen(
                [str(word) for word in command],
                env=self.environment(who),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log_of(self, who: str) -> Path:
        return self.folder / f"{who}.log"

    def run(self, *words: str | Path, **more: Any) -> subprocess.Popen[Any]:
        """Submit the app, as a process whose output is the run's log and whose status is 0 if the run completed.

        It has a session of its own, as all that is started here: what is left of it ends with the federation.
        """
        command = [sys.executable, "-m", "fedmitr_flwr", "simulate", "--superlink", NAME, *words]
        self._print(["fedmitr", *command[3:]])
        words = [str(word) for word in command]
        return subprocess.Popen(words, env=self.environment("operator"), start_new_session=True, **more)

    def processes(self, title: str = "", who: str = "") -> list[int]:
        """Ids of our processes whose command line holds `title`: everybody's, or only one's (by its FLWR_HOME)."""
        home = [f"FLWR_HOME={self.folder / who}"] if who else []
        return [pid for pid in marked(f"{MARK}={self.mark}", *home) if title in command_of(pid)]

    def send(self, number: signal.Signals, title: str = "", who: str = "") -> None:
        """Send a signal to such processes; SIGKILL to all of one client's is what a power cut does to its machine."""
        for pid in self.processes(title, who):
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, number)

    def _print(self, command: Sequence[str | Path]) -> None:
        if self.show:
            print("$", *(str(word).replace(f"{ROOT}/", "") for word in command), flush=True)
