"""What the repository has beside the package: a wheel carries it inside (pyproject.toml, force-include)."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INSIDE = "shipped"  # the folder of the wheel


def shipped(name: str) -> Path:
    """A file or folder of the repository's root: the wheel's copy, or else the checkout's own."""
    inside = PACKAGE / INSIDE / name
    return inside if inside.exists() else PACKAGE.parent / name
