"""Code from outside the package, by the path of a Python file or by the name of an entry point."""

import hashlib
import sys
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ConfigError, unread

SUFFIX = ".py"  # by which a setting's value is the path of a file, and no name


def is_file(value: object) -> bool:
    return isinstance(value, str) and value.endswith(SUFFIX)


def short(value: str) -> str:
    """A name that can be a part of a folder's name."""
    return Path(value).stem if is_file(value) else value


def contents(value: object) -> object:
    """The value, or, of a file that is there, what it holds: checkpoints of other code are of no use."""
    path = Path(value) if isinstance(value, str) and is_file(value) else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else value


def names(group: str) -> list[str]:
    """Of the entry points of installed packages in `fedmitr_flwr.<group>`."""
    from importlib.metadata import entry_points  # which half of a short command's time goes to

    return sorted(entry_points(group=f"fedmitr_flwr.{group}").names)


def load(value: str, group: str, key: str) -> Any:
    """The module of a file, or what the entry point `value` of `fedmitr_flwr.<group>` names.

    Raises:
        ConfigError: there is no such file or it cannot be run; the setting `key` is named.
    """
    if is_file(value):
        path = Path(value)
        try:
            return _of_file(path, hashlib.sha256(path.read_bytes()).hexdigest()[:12])
        except OSError as error:
            raise ConfigError(f"{key}: {unread('Python file', path, error)}") from error
        except Exception as error:  # of any type: it is somebody's program
            raise ConfigError(f"{key}: {path} cannot be imported ({type(error).__name__}: {error}); mend it") from error
    from importlib.metadata import entry_points

    (found,) = entry_points(group=f"fedmitr_flwr.{group}", name=value)
    try:
        return found.load()
    except Exception as error:
        package = found.dist.name if found.dist else found.module
        raise ConfigError(f"{key}: {value!r} of the package {package} cannot be imported ({error})") from error


@lru_cache(maxsize=64)
def _of_file(path: Path, content: str) -> ModuleType:
    """Run anew when the file has changed."""
    name = f"fedmitr_flwr_{path.stem}_{content}"
    spec = spec_from_file_location(name, path)
    assert spec is not None  # a Python file has a loader
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
