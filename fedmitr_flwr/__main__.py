"""`python -m fedmitr_flwr` is the command `fedmitr`."""

import os
import sys

from .cli import INTERRUPTED, main


def command() -> int:
    """Run the command; gives its exit status, to end with."""
    status = main()
    # Python's own end takes seconds where torch was loaded, half a minute on a busy machine. After a Ctrl-C that
    # met code in a string, as dataclasses are made of, it ends as killed by SIGINT.
    if status == INTERRUPTED or sys.argv[1:2] in (["simulate"], ["demo"]):  # which have nothing left to do
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(command())
