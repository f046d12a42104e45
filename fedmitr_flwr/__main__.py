"""`python -m fedmitr_flwr` is the command `fedmitr`."""

import os
import sys

from .cli import main


def command() -> int:
    """Run the command; gives its exit status, to end with."""
    status = main()
    if sys.argv[1:2] in (["simulate"], ["demo"]):  # which have loaded torch, and have nothing left to do
        sys.stdout.flush()
        os._exit(status)  # Python's own end takes seconds then, or half a minute on a busy machine
    return status


if __name__ == "__main__":
    sys.exit(command())
