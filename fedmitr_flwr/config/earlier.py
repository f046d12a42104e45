"""Settings of earlier versions: what holds in place of each, and what a run that was made with them has of today's.

A user's file or command line with one is refused, with what to write; a run folder's config.toml opens.
"""

from collections.abc import Mapping

from ..common.errors import ConfigError
from .sections import DIRECTIONS

_NOT_TAKEN_OVER = "what it did is gone"
_PUBLISHED = "it has its published value"

RETIRED: Mapping[str, str] = {
    "statistics.shrinkage": "it follows from the statistics, by a formula (OAS)",
    "statistics.ridge": "it is 1 for all",
    "statistics.gaussian": "variances are by class: 'diagonal'",
    "feddf.limit": "all images are taken",
    "feddf.passes": "it is 20 for all",
    "ensemble.temperature": "it is 3 for all",
    "ensemble.teach": "logits are taught",
    "ensemble.learn-step": _PUBLISHED,
    "ensemble.learn-decay": _PUBLISHED,
    "ensemble.statistics": "with upload.extras = 'statistics', FedMITR's model contains that of 'lda'",
    "ensemble.trim": _NOT_TAKEN_OVER,
    "ensemble.teacher-chunk": "it is 16 for all",
    "ensemble.stack": "teachers are one batched network on a GPU only: 'auto'",
    "inversion.lr": "it is 0.1, and of method 'adi' 0.25",
    "inversion.drop": "it is 0.3 for all",
    "inversion.rebirths": "it is 4, as inversion.mode = 'pri4' says",
    "inversion.tv": "it is 1e-4 for all",
    "inversion.roll": "nothing is rolled",
    "inversion.start": "images start from 'leaves', those of method 'adi' from 'noise'",
    "inversion.disagree": _NOT_TAKEN_OVER,
    "inversion.precision": "it is 'float32' for all",
    "inversion.compile": "nothing is compiled",
    "relabel.temperature": "it is 1 for all",
    "distill.batch-size": "it is 64 for all",
    "distill.ridge": "it is 0.1 for all",
    "distill.extrapolate": "it is 1: the student starts at the average itself",
    "distill.pretrained": "no start of the student has weights of its own",
    "distill.optimizer": "it is 'muon' for all",
    "distill.weight-decay": "it is 0.05 for all",
    "distill.schedule": "it is 'cosine' for all",
    "distill.soft": "logits are followed by 'mse', probabilities by 'kl': 'auto'",
    "distill.temperature": "it is 2, and of the rivals 4",
    "distill.high": "it is 0.1 for all",
    "distill.token": "it is 0.5 for all",
    "distill.low": "it is 1 for all",
    "distill.kd": "it is 1 for all",
    "distill.mix": "images are mixed by 'tokens', and those of the rivals are not mixed",
    "distill.keep": "it is 0.5, and 1 for the rivals",
    "distill.shift": "nothing is shifted",
    "distill.teachers": "they are asked 'again' on each augmented batch",
    "distill.grad-clip": "it is 1 for all",
    "distill.ema": "the student has the last weights",
    "rival.temperature": _PUBLISHED,
    "rival.steps": _PUBLISHED,
    "rival.lr": _PUBLISHED,
    "rival.latent": _PUBLISHED,
    "rival.width": _PUBLISHED,
    "rival.adversarial": _PUBLISHED,
    "rival.hard": _PUBLISHED,
    "rival.perturb": _PUBLISHED,
    "local.token-loss": "it is 0.5 for all",
    "local.label-smoothing": "labels are not smoothed",
    "local.prior-adjust": "no prior is added to the logits",
    "local.average": "a client uploads its last weights",
    "local.pull": _NOT_TAKEN_OVER,
    "local.weight-decay": "it is 0.05 for all",
    "local.schedule": "it is 'cosine' for all",
    "local.grad-clip": "it is 1 for all",
    "model.heads": "one head has 16 of model.width",
    "screen.images": "5 are made for each class",
    "flower.min-nodes": "there must be 2 nodes; flower.quorum says how many uploads are needed",
    "evaluate.batch-size": "it is 256 for all",
}

_ONE_TO_ONE = {
    "distill.epochs": "distill.rounds",
    "distill.images-per-epoch": "distill.images-per-round",
    "distill.passes": "distill.epochs-per-round",
}
_EXTRAS = {"upload.class-counts": "counts", "upload.statistics": "statistics", "upload.variances": "variances"}
_FLOWERS_NAMES = {
    "strategy.eta": "eta",
    "strategy.tau": "tau",
    "strategy.momentum": "server_momentum",
    "strategy.mu": "proximal_mu",
    "strategy.lr": "client_learning_rate",
}
# Where an old setting has another name now, or others: how a user writes it.
RENAMED: Mapping[str, str] = {
    **_ONE_TO_ONE,
    **{key: f"upload.extras = '{extra}'" for key, extra in _EXTRAS.items()},
    "upload.directions": "upload.extras = 'moments'",
    **{key: f"flower.options = '{name}=...'" for key, name in _FLOWERS_NAMES.items()},
    "strategy.eta": "flower.options = 'eta=...', or 'server_learning_rate=...' for fedavgm",
}

# Choices that there are no longer; a run that was made with one is opened with today's default in its place.
_GONE: Mapping[str, tuple[str, ...]] = {
    "ensemble.combine": ("logp", "joint"),
    "ensemble.weights": ("learned",),
    "relabel.mode": ("complement",),
    "distill.init": ("layerwise", "regmean", "statistics", "pretrained"),
}

UNSET = -1  # of an old strategy.*: the strategy's own


def refuse_earlier(key: str) -> None:
    """Raise ConfigError, with what to write now, where an earlier version had such a key."""
    if key in RENAMED:
        raise ConfigError(f"config key {key!r} was renamed; write {RENAMED[key]}")
    if key in RETIRED:
        raise ConfigError(f"config key {key!r} was retired: {RETIRED[key]}; remove it")


def gone(flat: Mapping[str, object]) -> list[str]:
    """The keys of a run's settings whose value is a choice that there is no longer."""
    return [key for key, values in _GONE.items() if flat.get(key) in values]


def upgraded(flat: Mapping[str, object]) -> dict[str, object]:
    """All or some settings of a run as this version spells them; those that it has no longer stay as they are.

    Moments in another number of directions than this version asks for cannot be used: the run opens without them.
    """
    found = {
        _ONE_TO_ONE.get(key, key): value for key, value in flat.items() if _ONE_TO_ONE.get(key, key) not in RENAMED
    }
    if isinstance(flat.get("data.flip"), bool):  # which was no choice of three
        found["data.flip"] = str(flat["data.flip"]).lower()
    if flat.get("local.head-lr") == 0 and "local.lr" in flat:  # which was: as the rest
        found["local.head-lr"] = flat["local.lr"]
    if flat.keys() & {*_EXTRAS, "upload.directions"}:
        words = [word for key, word in _EXTRAS.items() if flat.get(key)][-1:]  # each implies those before it
        words += ["moments"] * (flat.get("upload.directions") == DIRECTIONS)
        found["upload.extras"] = ", ".join(words)
    if flat.keys() & _FLOWERS_NAMES.keys():
        names = _FLOWERS_NAMES
        if flat.get("flower.strategy") == "fedavgm":
            names = names | {"strategy.eta": "server_learning_rate"}
        unread = flat.get("flower.strategy") == "oneshot"
        given = {name: flat[key] for key, name in names.items() if not unread and flat.get(key, UNSET) != UNSET}
        found["flower.options"] = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return found
