"""The settings that only some methods and strategies read: with real images, and those that Flower ships."""

import math
from dataclasses import dataclass

from .limits import Section, check

UNSET = -1.0  # of a strategy's setting: it has its own


@dataclass(frozen=True, kw_only=True)
class FedDFConfig(Section):
    """Real images for distillation, which FedMITR does without."""

    section = "feddf"
    path: str = ""  # a folder of images, or with train*.parquet; labels are not used; "": the images of data.proxy


@dataclass(frozen=True, kw_only=True)
class StrategyConfig(Section):
    """Of the strategies that Flower ships; -1 leaves what each has in server_app/builtin.py."""

    section = "strategy"
    eta: float = UNSET  # learning rate of the server: fedadam, fedyogi, fedadagrad, fedavgm; -1: the strategy's own
    tau: float = UNSET  # fedadam, fedyogi, fedadagrad: added to the root of the second moment; -1: the strategy's own
    momentum: float = UNSET  # of the server: fedavgm; -1: 0.9
    mu: float = UNSET  # fedprox: weight of the proximal term; -1: 0.1
    lr: float = UNSET  # qfedavg: the learning rate that it takes the clients' to be; -1: 0.01

    def __post_init__(self) -> None:
        limits = {"eta": math.inf, "tau": math.inf, "mu": math.inf, "lr": math.inf, "momentum": 0.999}
        for name, most in limits.items():
            value, least = getattr(self, name), 1e-12 if name == "lr" else 0  # which qfedavg divides by
            wanted = f"{UNSET:g} for the strategy's own, or a number from {least:g}"
            check(self._key(name), value, value == UNSET or least <= value <= most, f"{wanted} to {most:g}")
