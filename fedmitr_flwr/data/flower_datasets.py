"""The parts of flwr-datasets that we use, imported with its telemetry off unless the user asked for it.

Its plots need matplotlib and seaborn, and seaborn SciPy's statistics: 80 MB and two seconds, for what nothing here
draws. They are loaded by its first plot.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

# flwr-datasets reads this once, at import, and otherwise posts an event to telemetry.flower.ai for every split loaded.
# Reporting what an experiment reads is the user's choice: FLWR_TELEMETRY_ENABLED=1.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")


class ImportedLater(ModuleType):
    """Stands for a module until the first use of anything in it; `importlib.util.LazyLoader` loads on `import`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what inspects all modules is no use of this one
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


_PLOTS = "flwr_datasets.visualization"
_found = sys.modules.setdefault(_PLOTS, ImportedLater(_PLOTS))
try:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner, PathologicalPartitioner
finally:
    if isinstance(_found, ImportedLater):
        del sys.modules[_PLOTS]  # others get the module itself

__all__ = ["DirichletPartitioner", "IidPartitioner", "Partitioner", "PathologicalPartitioner"]
