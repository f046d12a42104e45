"""Settings that were given and that a run does not read: each of them would otherwise be ignored in silence."""

from collections.abc import Collection, Mapping

from .config import Config
from .sections import ONE_SHOT, OWN
from .text import toml_value

# Of a key, or of all that begin so: the setting that it waits for, and with which values it is read.
_NEEDS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "partition.alpha": ("partition.scheme", ("dirichlet",)),
    "partition.classes-per-client": ("partition.scheme", ("classes-per-client",)),
    "data.unknown-classes": ("partition.scheme", (OWN,)),
    "flower.clients": ("partition.scheme", (OWN,)),
    "evaluate.holdout": ("evaluate.where", ("clients",)),
    "krum.": ("method", ("krum",)),
    "feddf.": ("method", ("feddf",)),
}
# Of the one-shot methods: none of Flower's own strategies has anything to do with them.
_SERVER_PHASE = ("method", "screen.mode", "ensemble.", "inversion.", "relabel.", "distill.", "krum.", "feddf.")


def unread_line(config: Config, unread: Mapping[str, str], given: Collection[str] | None = None) -> str:
    """What was given without effect, in one line; nothing where all has some.

    Args:
        config: as it was given, before anything is resolved.
        unread: keys, or beginnings of keys, that this method or way of running does not read, each with the reason.
        given: the keys that somebody gave; None: all that do not have the default.
    """
    flat, defaults = config.to_flat(), Config().to_flat()
    keys = (
        [key for key in flat if flat[key] != defaults[key]] if given is None else [key for key in flat if key in given]
    )
    reasons = {key: reason for key in keys if (reason := _reason(key, config, flat, unread))}
    listed = ", ".join(f"{key} = {toml_value(flat[key])} ({reason})" for key, reason in reasons.items())
    return f"settings that this run does not read: {listed}" if listed else ""


def _reason(key: str, config: Config, flat: Mapping[str, bool | int | float | str], unread: Mapping[str, str]) -> str:
    """Why `key` is not read; "" where it is."""

    def because(other: str) -> str:
        return f"{other} = {toml_value(flat[other])}"

    if config.flower.strategy != ONE_SHOT and key.startswith(_SERVER_PHASE):
        return because("flower.strategy")
    if not config.privacy.epsilon and key in ("privacy.delta", "privacy.clip"):
        return because("privacy.epsilon")
    for beginning, (other, values) in _NEEDS.items():
        if key.startswith(beginning) and flat[other] not in values:
            return because(other)
    return next((reason for beginning, reason in unread.items() if key.startswith(beginning)), "")
