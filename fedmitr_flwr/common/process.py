"""What every process of this project does first: its files are its user's alone, and its log is plain text."""

import io
import logging
import os
import sys

from .errors import printable

MARK = "fedmitr: "  # before each of our lines in Flower's log
PRIVATE = 0o077  # permissions that no file or folder gets
NO_HOME = "there is no home folder for ~ (HOME is not set); set HOME, or give absolute paths (out-dir=/runs)"


def begin(*loggers: logging.Logger) -> None:
    """Let the files made from here on be read by their user only; escape what no terminal shows, in these logs too."""
    os.umask(os.umask(PRIVATE) | PRIVATE)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that its encoding lacks would be an error
    for logger in loggers:
        if _escaped not in logger.filters:
            logger.addFilter(_escaped)


def homeless(error: Exception) -> bool:
    """Whether a `~` stands for no folder: HOME is not set, and the system knows no other for this user."""
    return isinstance(error, RuntimeError) and "home directory" in str(error)


def _escaped(record: logging.LogRecord) -> bool:
    """A filter that changes the record: names and texts of other machines must not steer the reader's terminal."""
    record.msg, record.args = _in_lines(record.getMessage()), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = _in_lines(logging.Formatter().formatException(record.exc_info))
    return True


def _in_lines(text: str) -> str:
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


class Forward(logging.Handler):
    """Passes every record on to another logger, line by line and with a mark, as if it had been logged there."""

    def __init__(self, to: logging.Logger) -> None:
        super().__init__()
        self.to = to

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= self.to.getEffectiveLevel():
            *lines, last = (MARK + line for line in record.getMessage().split("\n"))
            for line in lines:
                self.to.handle(logging.makeLogRecord({**record.__dict__, "msg": line, "args": (), "exc_info": None}))
            self.to.handle(logging.makeLogRecord({**record.__dict__, "msg": last, "args": ()}))


def forward(name: str, to: logging.Logger) -> None:
    """Let what is logged as `name` and below appear where `to` does, and nowhere else."""
    logger = logging.getLogger(name)
    logger.handlers[:] = [Forward(to)]
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
