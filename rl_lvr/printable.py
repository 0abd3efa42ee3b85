"""Text of unknown origin, made fit for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Data may hold control characters, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
