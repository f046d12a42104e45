"""One file per method. A method is a module with `fuse(job: Job) -> Fused`; its file's name is its name.

A method need not be here: `method = "path/to/mine.py"` is a file anywhere, and packages offer theirs as entry points
of the group `fedmitr_flwr.methods`.

A method that needs more than the uploaded weights has `check(config: Config) -> None` as well. It is called before any
client is asked, and raises ConfigError where the settings do not give what it needs. One that needs so many uploads has
`check_clients(config: Config, clients: int) -> None`, called once their number is known and before any client trains.
One that does not read some settings names them, or how they begin, in `UNREAD`; a run that is given one without effect
says so. One that replaces settings has `settings(config: Config) -> Config`: its `fuse` is given, and result.json
holds, what that returns.
"""

import pkgutil
from dataclasses import replace
from importlib import import_module
from types import ModuleType

from ..common import outside
from ..common.errors import ConfigError, RunError
from ..config import Config
from ..config.limits import nearest
from ..config.sections import ONE_SHOT
from .contract import Fused, Job

NOT_METHODS = {"contract", "rounds"}
OWN_SECTIONS = ("feddf.", "krum.")  # of settings that only the method reads after which they are named
# What the server phase reads: Flower's strategies have nothing to do with it.
SERVER_PHASE: tuple[str, ...] = (
    "method",
    "screen.mode",
    "ensemble.",
    "inversion.",
    "relabel.",
    "distill.",
    *OWN_SECTIONS,
)
SERVER_PHASE += ("workers", "ray-address")


def available() -> list[str]:
    """The names of all methods: of the files here, and of installed packages."""
    return sorted({*_own(), *outside.names("methods")})


def _own() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_METHODS]


def check(config: Config, clients: int | None = None) -> None:
    """Raise ConfigError if there is no method `config.method`, or if these settings do not give what it needs.

    Of how many `clients`: None where the number is not known yet.
    """
    from ..ensemble.ensemble import rule
    from ..inversion.trajectory import prior_named

    module = load(config.method)
    rule(config.ensemble.combine)  # both may be files
    prior_named(config.inversion.prior)
    if hasattr(module, "check"):
        module.check(config)
    if clients is not None and hasattr(module, "check_clients"):
        module.check_clients(config, clients)


def unread(config: Config) -> dict[str, str]:
    """Keys, or beginnings of keys, that the method does not read or replaces; each with the reason.

    Of a run by one of Flower's strategies, what is of the server phase.
    """
    replaced = in_force(config).to_flat()
    if config.flower.strategy != ONE_SHOT:
        return dict.fromkeys(SERVER_PHASE, f"flower.strategy = {config.flower.strategy!r}")
    keys = [key for key, value in config.to_flat().items() if value != replaced[key]]
    keys += getattr(load(config.method), "UNREAD", ())
    keys += [section for section in OWN_SECTIONS if section != f"{config.method}."]
    return dict.fromkeys(keys, f"method = {config.method!r}")


def in_force(config: Config) -> Config:
    """The settings that the method reads: `config`, but for those that it replaces. Of its own result, itself."""
    module = load(config.method)
    return module.settings(config) if hasattr(module, "settings") else config


def fuse(job: Job) -> Fused:
    """The method of `job.config.method` on the uploads, with the settings in force."""
    config = in_force(job.config)
    fused = load(config.method).fuse(replace(job, config=config))
    if not isinstance(fused, Fused):
        raise RunError(f"method = {config.method!r} returned a {type(fused).__name__}; return methods.contract.Fused")
    return fused


def load(name: str) -> ModuleType:
    """The module of a method; `load("fedmitr").fuse(job)`."""
    if name in _own():
        return import_module(f"{__name__}.{name}")
    known = available()
    if not outside.is_file(name) and name not in known:
        raise ConfigError(
            f"method = {name!r} is not one of: {', '.join(known)}, nor a path to a .py file{nearest(name, known)}"
        )
    module: ModuleType = outside.load(name, "methods", "method")
    if not callable(getattr(module, "fuse", None)):
        raise ConfigError(f"method = {name!r} has no function fuse(job); write one (README, 'Add a method')")
    return module
