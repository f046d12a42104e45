"""What screening says of an upload."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One reason to distrust one upload.

    Attributes:
        client: whose upload it is.
        check: norm | direction | start | copy | size | sums | answers | unsure.
        value: the number that was looked at.
        text: what is unusual, in words, and the fix.
        clear: no honest client can be so, by a wide margin; else it is only unusual.
    """

    client: int
    check: str
    value: float
    text: str
    clear: bool = False
