"""Flower's own strategies, as far as settings name them; server_app/builtin.py runs them."""

import math
from collections.abc import Mapping

from ..common.errors import ConfigError
from ..config import Config
from ..config.limits import nearest
from ..config.sections import ONE_SHOT

STRATEGIES: tuple[str, ...] = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad")
STRATEGIES += ("fedmedian", "fedtrimmedavg", "krum", "qfedavg")

# What `flower.options` may set of a strategy, with the least and the most that it can be.
_ADAPTIVE = {"eta": (0.0, math.inf), "tau": (0.0, math.inf)}
OPTIONS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "fedprox": {"proximal_mu": (0.0, math.inf)},
    **dict.fromkeys(("fedadam", "fedyogi", "fedadagrad"), _ADAPTIVE),
    "fedavgm": {"server_learning_rate": (0.0, math.inf), "server_momentum": (0.0, 0.999)},
    "qfedavg": {"client_learning_rate": (1e-12, math.inf)},  # which it divides by
}


def check(config: Config) -> None:
    """Raise ConfigError for what Flower's strategies cannot do."""
    name = config.flower.strategy
    if name not in STRATEGIES:
        known = (ONE_SHOT, *STRATEGIES)
        raise ConfigError(f"flower.strategy = {name!r} is unknown; use {' | '.join(known)}{nearest(name, known)}")
    _check_options(config)
    if config.resume_from:
        raise ConfigError(f"resume-from needs flower.strategy = 'oneshot'; {name} starts from the beginning")
    if config.upload.sends_statistics:
        raise ConfigError(
            f"upload.extras = {config.upload.extras!r}: {name} averages all that is uploaded; leave out all but "
            "counts, or use flower.strategy = 'oneshot'"
        )
    if config.upload.dtype != "float32":
        raise ConfigError(
            f"upload.dtype = {config.upload.dtype!r}: {name} would average in half precision; "
            "use 'float32', or flower.strategy = 'oneshot'"
        )


def _check_options(config: Config) -> None:
    name, known = config.flower.strategy, OPTIONS.get(config.flower.strategy, {})
    for option, value in config.flower.strategy_options().items():
        if option not in known:
            takes = f"it has {' and '.join(known)}{nearest(option, known)}" if known else "it has none; leave it empty"
            raise ConfigError(f"flower.options: {option} is no option of flower.strategy = {name!r}; {takes}")
        least, most = known[option]
        if not least <= value <= most:
            raise ConfigError(f"flower.options: {option} = {value:g} is not possible; use {least:g} to {most:g}")
