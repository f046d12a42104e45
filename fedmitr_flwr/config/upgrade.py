"""Settings of older versions: how today's are spelled, and what a run that was made with them has of today's.

A user's file or command line with an old spelling is refused, with the new one; a run folder's config.toml opens.
"""

from collections.abc import Mapping

from .sections import DIRECTIONS

# Where an old setting has another name now, or others: how a user writes it.
RESPELLED: Mapping[str, str] = {
    "upload.class-counts": "upload.extras = 'counts'",
    "upload.statistics": "upload.extras = 'statistics'",
    "upload.variances": "upload.extras = 'variances'",
    "upload.directions": "upload.extras = 'moments'",
    "strategy.eta": "flower.options = 'eta=...', or 'server_learning_rate=...' for fedavgm",
    "strategy.tau": "flower.options = 'tau=...'",
    "strategy.momentum": "flower.options = 'server_momentum=...'",
    "strategy.mu": "flower.options = 'proximal_mu=...'",
    "strategy.lr": "flower.options = 'client_learning_rate=...'",
}

_EXTRAS = {"upload.class-counts": "counts", "upload.statistics": "statistics", "upload.variances": "variances"}
_FLOWERS_NAMES = {
    "strategy.eta": "eta",
    "strategy.tau": "tau",
    "strategy.momentum": "server_momentum",
    "strategy.mu": "proximal_mu",
    "strategy.lr": "client_learning_rate",
}
UNSET = -1  # of an old strategy.*: the strategy's own


def upgraded(flat: Mapping[str, object]) -> dict[str, object]:
    """All or some settings of a run as this version spells them; those that it has no longer stay as they are.

    Moments in another number of directions than this version asks for cannot be used: the run opens without them.
    """
    found = {key: value for key, value in flat.items() if key not in RESPELLED}
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
