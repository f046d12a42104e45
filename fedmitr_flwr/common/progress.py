"""Long work shows itself: a live line by stage on a terminal, otherwise one log line per interval.

The live lines are rich's. With NO_COLOR, or where stderr is no terminal, there are no escapes at all.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # it takes a tenth of a second to import, and only a terminal needs it
    from rich.progress import Progress as Bars

_log = logging.getLogger("fedmitr")

EVERY = "FEDMITR_EVERY"  # an environment variable: seconds between two lines of a process whose log another one reads
FEW = 24  # clients that are spoken of one by one

_SAID = {"alive": "alive {:.0%}", "accuracy": "student {:.1f} %"}
_bars: "Bars | None" = None  # of this process's terminal, while `on_screen` lasts


def live() -> bool:
    """Is stderr a terminal, and may it be sent escapes?"""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def on_screen(*, total: bool = True) -> Iterator[None]:
    """On a terminal, all stages within are lines of one display, below what is logged; with the `total` of their time.

    A finished stage leaves its line behind, so that the display is never longer than what is at work.
    """
    global _bars
    if _bars is not None or not live():
        yield
        return
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    console, label = Console(stderr=True), TextColumn("{task.description}", table_column=Column(min_width=16))
    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    said = TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    bars = Progress(label, BarColumn(16), left, TextColumn("{task.fields[left]:4}"), said, console=console)
    whole = Progress(label, TimeElapsedColumn(), console=console)
    whole.add_task("total", visible=total)
    handlers = [each for each in logging.getLogger().handlers if getattr(each, "stream", None) is sys.stderr]
    before = sys.stderr
    with Live(Group(bars, whole), console=console, transient=not total, redirect_stdout=False):
        _bars = bars
        try:
            for handler in handlers:  # they hold on to the stream that rich has put its own in the place of
                handler.setStream(sys.stderr)  # type: ignore[attr-defined]
            yield
        finally:
            _bars = None
            for handler in handlers:
                handler.setStream(before)  # type: ignore[attr-defined]


class Progress:
    """Counts `total` units of work; use it as a context manager.

    On a terminal it is a live line, of a display of its own if there is none (`on_screen`). Elsewhere it logs a line
    every `every` seconds and one at the end, with the last values given to `update`, the rate and the time left.
    """

    def __init__(self, label: str, total: int, unit: str, every: float | None = None) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._every = float(os.environ.get(EVERY, 10)) if every is None else every
        self._done, self._values, self._text = 0.0, dict[str, float](), ""
        self._lock, self._display = threading.Lock(), ExitStack()

    @classmethod
    def of_clients(cls, count: int) -> Self:
        """That of all clients together; with many, a line a minute."""
        return cls("clients", count, "clients", None if count <= FEW else 60.0)

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        self._display.enter_context(on_screen(total=False))
        self._bars = _bars
        if self._bars:
            self._task = self._bars.add_task(self._label, total=self._total, left="left", said="")
        elif EVERY in os.environ:  # who reads it wants to know that the work has begun
            _log.info("%s", self._line())
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        """The work has ended, or failed, and its line stays as it is."""
        if self._bars:
            done = self._total if self._done > self._total - 1e-6 else self._done  # parts may sum to a little less
            self._bars.update(self._task, completed=done, left="", said=self._so_far())
            ours = [task for task in self._bars.tasks if task.id == self._task]
            self._bars.remove_task(self._task)
            self._bars.console.print(self._bars.make_tasks_table(ours))
        else:
            _log.info("%s", self._line("stopped after" if failed else "done in"))
        self._display.close()

    def update(self, n: float = 1, **values: float) -> None:
        """`n` more units are done; `values` (loss=..., alive=...) are shown beside them. Any thread may say so."""
        with self._lock:
            self._done += n
            self._values |= values
            now = time.monotonic()
            if self._bars:
                self._bars.update(self._task, completed=self._done, said=self._so_far())
            elif now - self._last >= self._every:
                self._last = now
                _log.info("%s", self._line())

    def reach(self, done: float, said: str) -> None:
        """`done` units in all, with values in words, as another process has them."""
        self._text = said or self._text
        self.update(done - self._done)

    def _line(self, end: str = "") -> str:
        elapsed = time.monotonic() - self._start
        left = f", {clock((self._total - self._done) * elapsed / self._done)} left" if self._done else ""
        return f"{self._label}: {self._so_far()}{f', {end} {clock(elapsed)}' if end else left}"

    def _so_far(self) -> str:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        rate, time_unit = (60 * rate, "min") if 0 < rate < 0.1 else (rate, "s")
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        values = [_SAID.get(name, name + "={:.4g}").format(float(value)) for name, value in self._values.items()]
        parts = [f"{int(self._done + 1e-6)}/{self._total} {self._unit}", self._text, *values]
        parts.append(f"{shown} {self._unit}/{time_unit}")
        if self._bars and self._total > 1000:  # of which the bar says enough, in a terminal of 80 columns
            del parts[0]
        return ", ".join(filter(None, parts))


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Series:
    """Values of each step of long work, to be drawn later."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        """The next step's values; always the same names."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(float(value))

    def means(self) -> dict[str, float]:
        """Over all steps."""
        return {name: sum(values) / len(values) for name, values in self._values.items()}

    def thin(self, most: int = 50) -> dict[str, list[float]]:
        """At most so many steps, evenly chosen and with the first and the last one: `step`, and each name's values."""
        total = max(map(len, self._values.values()), default=0)
        count = min(most, total)
        steps = [round(place * (total - 1) / max(1, count - 1)) for place in range(count)]
        kept = {name: [float(f"{values[step]:.4g}") for step in steps] for name, values in self._values.items()}
        return {"step": [float(step) for step in steps], **kept}
