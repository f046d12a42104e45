"""Files of settings, and bench files, that can be given by name: `-c digits`, `fedmitr bench smoke`."""

import os
from pathlib import Path

from ..common.errors import ConfigError
from ..common.shipped import shipped
from .limits import nearest

SETTINGS, BENCHES = "configs", "configs/bench"


def presets(folder: str) -> dict[str, Path]:
    """The files of SETTINGS or BENCHES by name."""
    return {path.stem: path for path in sorted(shipped(folder).glob("*.toml"))}


def named_file(given: Path, folder: str = SETTINGS) -> Path:
    """The file at this path, or the preset of this name.

    Raises:
        ConfigError: there is neither.
    """
    known, name = presets(folder), str(given)
    if name in known and not given.is_file():  # a folder of this name is no settings
        return known[name]
    if not os.path.lexists(given):
        what, others = ("bench file", SETTINGS) if folder == BENCHES else ("config file", BENCHES)
        hint = nearest(name, known)
        if name in presets(others):
            hint = f"; {name} goes with `fedmitr {'bench' if others == BENCHES else 'run -c'}`"
        raise ConfigError(f"there is no {what} {given}; give the path of one, or a preset: {', '.join(known)}{hint}")
    return given
