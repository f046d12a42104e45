"""One file per method. A method is a module with `fuse(job: Job) -> Fused`; its file's name is its name."""

import pkgutil
from importlib import import_module
from types import ModuleType

from ..errors import ConfigError

NOT_METHODS = {"contract"}


def available() -> list[str]:
    """The names of all methods, found by file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_METHODS)


def load(name: str) -> ModuleType:
    """The module of a method; `load("fedmitr").fuse(job)`."""
    if name not in available():
        raise ConfigError(f"method = {name!r} is not one of: {', '.join(available())}")
    return import_module(f"{__name__}.{name}")
