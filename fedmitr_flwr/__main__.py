"""`python -m fedmitr_flwr` is the command `fedmitr`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
