"""Settings that are chosen by what training starts from, where they are left to be: 0, or "auto".

The body of a model that comes with weights is to be kept, and only its head is new: few and short steps (docs/LOG.md).
From scratch there is nothing to be spoiled, and much to be learned.
"""

from .config import Config
from .sections import AUTO

FROM_SCRATCH: dict[str, object] = {
    "data.flip": "false",
    "local.epochs": 50,
    "local.optimizer": "muon",
    "local.lr": 3e-3,
    "inversion.stops": "0.1,0.3",
    "distill.init": "average",
    "distill.epochs-per-round": 60,
    "distill.lr": 3e-3,
}
WITH_WEIGHTS: dict[str, object] = {
    "data.flip": "true",  # as timm trains by default
    "local.epochs": 3,
    "local.optimizer": "adamw",
    "local.lr": 1e-4,
    "local.head-lr": 1e-2,
    "inversion.stops": "0.0125,0.025,0.05,0.075",
    "distill.init": "wudi",
    "distill.epochs-per-round": 5,
    "distill.lr": 1e-4,
}


def settled(config: Config) -> Config:
    """`config` with a recipe's values in place of all that is left to be chosen."""
    return Config.from_flat(_chosen(config), base=config)


def chosen_line(config: Config) -> str:
    """What `settled` chooses, in one line; nothing where all is given."""
    start = "training from scratch" if config.model.weights == "none" else "model.weights is given"
    chosen = ", ".join(f"{key} = {value}" for key, value in _chosen(config).items())
    return f"{start}: {chosen}" if chosen else ""


def _chosen(config: Config) -> dict[str, object]:
    given = config.to_flat()
    # A head that is as new as the rest learns as the rest does.
    as_the_rest = {"local.head-lr": config.local.lr or FROM_SCRATCH["local.lr"]}
    recipe = FROM_SCRATCH | as_the_rest if config.model.weights == "none" else WITH_WEIGHTS
    return {key: value for key, value in recipe.items() if given[key] in (0, AUTO)}
