"""What became of an answer."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """Whether a completion gives the reference answer."""

    RIGHT = "right"
    WRONG = "wrong"
    UNREADABLE = "unreadable"
    """No answer could be read out of the completion."""
    UNSCORED = "unscored"
    """There is no reference, or it cannot be read."""

    @classmethod
    def of(cls, right: bool | None) -> Verdict:
        """From right, wrong, or None for unreadable."""
        return cls.UNREADABLE if right is None else cls.RIGHT if right else cls.WRONG
