"""FedMITR: one-shot federated learning with vision transformers, from one upload to one global model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library.fusion import Result, average, distil, fuse, invert
    from .library.run import Run
    from .library.together import Ensemble

__version__ = "0.2.0"
__all__ = ["Ensemble", "Result", "Run", "average", "distil", "fuse", "invert"]

_PLACES = {"Ensemble": "together", "Run": "run"}  # in `library`; all else is in `fusion`


def __getattr__(name: str) -> Any:
    """The library is imported when it is first asked for: the command line's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".library.{_PLACES.get(name, 'fusion')}", __name__), name)
