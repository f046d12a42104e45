"""Completion on the command line: settings and their values, presets, methods, runs. How to turn it on: README."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import Config
from .described import methods
from .presets import BENCHES, SETTINGS, presets
from .schema import limits
from .text import PATHS


def complete(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], runs: Path) -> None:
    """Answer the shell and end the process. `runs` is where run folders are made."""
    from argcomplete import autocomplete
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    files, folders = FilesCompleter(("toml",)), DirectoriesCompleter()
    known = list(Config().to_flat())
    completers: dict[str, Any] = {
        "config": lambda prefix, **_: [*presets(SETTINGS), *files(prefix)],
        "file": lambda prefix, **_: [*presets(BENCHES), *files(prefix)],
        "method": lambda **_: methods(),
        "run": lambda prefix, **_: [*map(str, _runs(runs)), *folders(prefix)],
        "settings": lambda prefix, **_: settings(prefix) or FilesCompleter()(prefix),
        "words": lambda **_: [*known, *{key.rpartition(".")[0] for key in known if "." in key}],
    }
    for command in commands.values():
        for action in command._actions:
            if action.dest in completers:
                action.completer = completers[action.dest]  # type: ignore[attr-defined]
    autocomplete(parser, always_complete_options=False)


def settings(prefix: str) -> list[str]:
    """Words of the form key=value that begin so: keys with their =, and behind that the values that are known."""
    known = Config().to_flat()
    key, equals, value = prefix.partition("=")
    if not equals:
        return [f"{key}=" for key in known if key.startswith(prefix)]
    limit = limits().get(key, {})
    found: Iterable[object] = limit.get("enum") or limit.get("anyOf", [{}])[0].get("enum", ())
    found = ("true", "false") if isinstance(known.get(key), bool) else found
    words = [*map(str, found), *PATHS.get(key, ())]
    return [f"{key}={word}" for word in words if word.startswith(value)]


def _runs(folder: Path) -> list[Path]:
    return [path.parent for path in folder.expanduser().glob("[!.]*/config.toml")]
