"""The errors a user can mend. Each message is one line: what is wrong, where, and the fix."""

import logging
from functools import lru_cache
from pathlib import Path

_log = logging.getLogger("fedmitr")


class UserError(ValueError):
    """Something the user gave is wrong; the command line prints the message and exits with status 2."""


class ConfigError(UserError):
    """An unknown, ill-typed or impossible setting."""


class DataError(UserError):
    """Missing, corrupt or unsuitable images or labels."""


class ModelError(UserError):
    """A model that cannot be built, or weights that do not fit it."""


class UploadError(UserError):
    """An upload that must not enter the ensemble."""


class RunError(UserError):
    """A run folder that cannot be created, continued or fused."""


class DiskError(RunError):
    """A file of the run cannot be written or read: the disk is full or read-only, or permission is denied."""


class Failed(RuntimeError):
    """A run through Flower did not complete; the message is Flower's. `status` is what the command line exits with."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def unread(what: str, path: Path, error: Exception) -> str:
    """Explain why a user-supplied file cannot be read, with the fix. `what` describes the expected content."""
    if isinstance(error, FileNotFoundError):
        return f"there is no {what} {path}; give the path of one"
    why = (isinstance(error, OSError) and error.strerror) or error
    return f"cannot read the {what} {path}: {why}; mend that, or give the path of another"


@lru_cache(maxsize=1024)
def say_once(line: str, level: int = logging.WARNING) -> None:
    """Log the line, in this process once: the same data and weights are opened at several stages."""
    _log.log(level, "%s", printable(line))


def printable(text: str) -> str:
    """One line that a terminal shows as it is: control characters, line breaks too, are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
