"""What screening says of an upload."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One reason to distrust one upload.

    Attributes:
        client: whose upload it is.
        check: norm | direction | copy | size | answers | unsure.
        value: the number that was looked at.
        text: what is strange, in words, and the fix.
    """

    client: int
    check: str
    value: float
    text: str
