"""The parts of flwr-datasets that we use, imported with its telemetry off unless the user asked for it."""

import os

# flwr-datasets reads this once, at import, and otherwise posts an event to telemetry.flower.ai for every split loaded.
# What an experiment reads is nobody else's business; whoever wants to report sets FLWR_TELEMETRY_ENABLED=1.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
)

__all__ = ["DirichletPartitioner", "IidPartitioner", "Partitioner", "PathologicalPartitioner"]
