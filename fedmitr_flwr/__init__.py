"""FedMITR: one-shot federated learning with vision transformers, from one upload to one global model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.ensemble import Ensemble
    from .api.fusion import Result, average, distil, fuse, invert
    from .api.run import Run

__version__ = "0.2.0"
__all__ = ["Ensemble", "Result", "Run", "average", "distil", "fuse", "invert"]

_PLACES = {"Ensemble": "ensemble", "Run": "run"}  # in `api`; all else is in `fusion`


def __getattr__(name: str) -> Any:
    """The library is imported when it is first asked for: the command line's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".api.{_PLACES.get(name, 'fusion')}", __name__), name)
