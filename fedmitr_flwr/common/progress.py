"""Long work shows itself: a bar on a terminal, otherwise one log line per interval."""

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_log = logging.getLogger("fedmitr")


class Progress:
    """Counts `total` units of work; use it as a context manager.

    On a terminal it is a tqdm bar. Elsewhere it logs a line every `every` seconds and one at the end, with the last
    values given to `update`, the rate and the time left.
    """

    def __init__(self, label: str, total: int, unit: str, every: float = 10.0) -> None:
        self._label, self._total, self._unit, self._every = label, total, unit, every
        self._done = 0
        self._values: dict[str, float] = {}
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._label, unit=f" {self._unit}", dynamic_ncols=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            _log.info("%s", self._line("stopped after" if kind else "done in"))

    def update(self, n: int = 1, **values: float) -> None:
        """`n` more units are done; `values` (loss=..., alive=...) are shown beside them. Any thread may say so."""
        with self._lock:
            self._done += n
            self._values |= values
            now = time.monotonic()
            if self._bar is not None:
                self._bar.set_postfix_str(self._shown(), refresh=False)
                self._bar.update(n)
            elif now - self._last >= self._every:
                self._last = now
                _log.info("%s", self._line())

    def _line(self, end: str = "") -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self._done / elapsed
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        parts = [f"{self._done}/{self._total} {self._unit}", self._shown(), f"{shown} {self._unit}/s"]
        if end:
            parts.append(f"{end} {clock(elapsed)}")
        elif rate:
            parts.append(f"{clock((self._total - self._done) / rate)} left")
        return f"{self._label}: " + ", ".join(part for part in parts if part)

    def _shown(self) -> str:
        return ", ".join(f"{name}={float(value):.4g}" for name, value in self._values.items())


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
