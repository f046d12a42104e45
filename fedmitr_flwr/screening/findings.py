"""What screening says of an upload."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One reason to distrust one upload."""

    client: int
    check: str  # norm | direction | start | copy | size | sums | answers | unsure
    value: float  # that was looked at
    text: str  # what is unusual, in words, and the fix
    clear: bool = False  # no honest client can be so, by a wide margin; else it is only unusual
