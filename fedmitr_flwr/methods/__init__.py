"""One file per method. A method is a module with `fuse(job: Job) -> Fused`; its file's name is its name.

A method that needs more than the uploaded weights has `check(config: Config) -> None` as well. It is called before any
client trains, and raises ConfigError where the settings do not give what it needs.
"""

import pkgutil
from importlib import import_module
from types import ModuleType

from ..config import Config
from ..errors import ConfigError

NOT_METHODS = {"contract", "loop"}


def available() -> list[str]:
    """The names of all methods, found by file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_METHODS)


def check(config: Config) -> None:
    """Raise ConfigError if there is no method `config.method`, or if these settings do not give what it needs."""
    module = load(config.method)
    if hasattr(module, "check"):
        module.check(config)


def load(name: str) -> ModuleType:
    """The module of a method; `load("fedmitr").fuse(job)`."""
    if name not in available():
        raise ConfigError(f"method = {name!r} is not one of: {', '.join(available())}")
    return import_module(f"{__name__}.{name}")
