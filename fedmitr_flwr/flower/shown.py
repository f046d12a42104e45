"""What of Flower's output the user sees: our own lines, as if they were logged here. All of it goes to a log file."""

import contextlib
import logging
import re
import time
from pathlib import Path

from ..common.process import MARK
from ..common.progress import Progress

log = logging.getLogger("fedmitr")

BAD_INPUT = "bad input: "  # before what the ServerApp says of settings, data or weights that cannot be
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_OURS = re.compile(rf"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[^:]*: +{MARK}(.*)")
_CLIENT = re.compile(r"client \d+")
_WORK = re.compile(  # a line of `Progress`
    r"(?P<label>[^:]+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>[^,]+)"
    r"(?:, (?P<said>.+?))?, \S+ (?P=unit)/(?:s|min)(?:, (?P<end>.+))?"
)


class Shown:
    """Takes Flower's output line by line.

    Attributes:
        run_id, folder: what it has said of the run; "" until then.
        bad_input: what the ServerApp says of bad input, if it does.
        ending: what the run ends with, line by line.
        log: the file of all lines; in the run folder, as soon as there is one on this machine.
    """

    def __init__(self, home: Path) -> None:
        self.run_id = self.folder = self.bad_input = ""
        self.ending: list[str] = []
        self.log = home / f"flower-{time.strftime('%Y%m%d-%H%M%S')}.log"
        self._stages = dict[str, Progress]()
        self._parts = dict[str, float]()  # of each client's work, what is done

    def begin(self, folder: str) -> None:
        """The run has a folder, into which the log goes."""
        self.folder = folder
        if Path(folder).is_dir():
            with contextlib.suppress(OSError):  # another file system
                self.log = self.log.rename(Path(folder) / self.log.name)

    def close(self) -> None:
        """End the stages that have not ended by themselves."""
        for stage in self._stages.values():
            stage.__exit__(True)
        self._stages.clear()

    def line(self, raw: bytes) -> None:
        text = _ESCAPES.sub("", raw.decode(errors="replace")).rstrip("\r\n")
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
        if found := re.search(r"Successfully started run (\d+)", text):
            self.run_id = found[1]
        if found := _OURS.search(text):
            self._ours(logging.getLevelNamesMapping()[found[1]], found[2], text.startswith("(ClientAppActor"))

    def _ours(self, level: int, text: str, of_client: bool) -> None:
        begins = text.startswith("run folder: ") and not self.folder
        if begins:  # first: who reads the line may interrupt at once
            self.begin(text.removeprefix("run folder: "))
        if text.startswith(BAD_INPUT):
            self.bad_input = text.removeprefix(BAD_INPUT)
        elif level > logging.INFO:
            log.log(level, "%s", text)
        elif work := _WORK.fullmatch(text):
            self._work(text, **work.groupdict())
        elif of_client or _CLIENT.match(text):  # one line is of all
            return
        elif self.ending or not text:  # an empty line is the first of the ending
            self.ending.append(text)
        else:
            log.info("%s", text)
        if begins:
            log.info("log of Flower and Ray: %s", self.log)

    def _work(self, text: str, label: str, done: str, total: str, unit: str, said: str | None, end: str | None) -> None:
        reached, of_one = float(done), _CLIENT.fullmatch(label)
        if of_one:  # perhaps late: of clients that the server has heard of
            self._parts[label] = reached / max(1, int(total))
            label, reached, end = "clients", sum(self._parts.values()), None
        ended, stage = end is not None and not end.endswith(" left"), self._stages.get(label)
        if stage is None and ended:  # it was over before it was heard of
            log.info("%s", text)
        elif stage is None and not of_one:
            stage = Progress.of_clients(int(total)) if label == "clients" else Progress(label, int(total), unit)
            self._stages[label] = stage.__enter__()
        if stage:
            stage.reach(max(reached, sum(self._parts.values())) if label == "clients" else reached, said or "")
        if stage and ended:
            self._stages.pop(label).__exit__(str(end).startswith("stopped"))
            self._parts.clear()
