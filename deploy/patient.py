"""Run `flower-superlink` with a database that is waited for longer.

    python patient.py flower-superlink OPTION ...

All that the SuperLink is asked writes to its SQLite database, and with large models a single change takes many seconds:
when the last client has the message, Flower deletes the model in it. flwr 1.41 waits for 5 seconds and then fails with
"database is locked", which its clients take for final; there is no option for it (docs/adr/0021-patience.md).
"""

import sys
from collections.abc import Iterable
from importlib.metadata import entry_points

from flwr.supercore import constant

MILLISECONDS = "25000"
BUSY = "busy_timeout"


def patient(pragmas: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Flower's settings of SQLite, with another patience."""
    return tuple((name, MILLISECONDS if name == BUSY else value) for name, value in pragmas)


if __name__ == "__main__":
    constant.SQLITE_PRAGMAS = patient(constant.SQLITE_PRAGMAS)  # before the module that uses them is imported
    sys.argv = sys.argv[1:]
    (command,) = entry_points(group="console_scripts", name=sys.argv[0])
    sys.exit(command.load()())
