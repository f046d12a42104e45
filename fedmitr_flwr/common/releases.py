"""Is a release of Flower new enough? Its number says so; nothing of it is imported."""

import re

FLWR = "1.41.0"  # the oldest that has what the two apps import


def release(version: str) -> tuple[int, int]:
    """`1.42.0.dev20260101` -> (1, 42); what is no version is older than any."""
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def too_old(found: str, needed: str = FLWR) -> str | None:
    """In words, with the fix, if the release `found` is older than `needed`."""
    if release(found) >= release(needed):
        return None
    return f"flwr {found or 'of an unknown version'} is too old; run there: pip install 'flwr[simulation]~={needed}'"


def require(found: str) -> None:
    """Raise ImportError, in one line, where an import from Flower would fail with a riddle."""
    if problem := too_old(found):
        raise ImportError(f"this app cannot be loaded: {problem}")
