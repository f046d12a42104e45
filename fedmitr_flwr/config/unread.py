"""Settings that were given and that a run does not read: each of them would otherwise be ignored in silence."""

from collections.abc import Collection, Mapping

from .config import Config
from .sections import OWN
from .text import toml_value

# The setting that a key waits for, and with which of its values the key is read.
_NEEDS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "partition.alpha": ("partition.scheme", ("dirichlet",)),
    "partition.classes-per-client": ("partition.scheme", ("classes-per-client",)),
    "data.unknown-classes": ("partition.scheme", (OWN,)),
    "flower.clients": ("partition.scheme", (OWN,)),
    "evaluate.holdout": ("evaluate.where", ("clients",)),
}


def unread_line(config: Config, unread: Mapping[str, str], given: Collection[str] | None = None) -> str:
    """What was `given` without effect, in one line; nothing where all has some. None: all that is not the default.

    The config is as it was before anything is resolved. Keys, or beginnings of keys, that this method or way of running
    does not read are in `unread`, each with the reason.
    """
    flat, defaults = config.to_flat(), Config().to_flat()
    reasons = dict(unread)
    for key, (other, values) in _NEEDS.items():
        if flat[other] not in values:
            reasons[key] = f"{other} = {toml_value(flat[other])}"
    if not config.privacy.epsilon:
        reasons |= dict.fromkeys(("privacy.delta", "privacy.clip"), "privacy.epsilon = 0.0")
    if config.workers == Config.workers:  # none
        reasons["ray-address"] = f"workers = {toml_value(Config.workers)}"
    without_effect = []
    for key, value in flat.items():
        reason = next((reason for beginning, reason in reasons.items() if key.startswith(beginning)), "")
        if reason and (value != defaults[key] if given is None else key in given):
            without_effect.append(f"{key} = {toml_value(value)} ({reason})")
    return f"settings that this run does not read: {', '.join(without_effect)}" if without_effect else ""
