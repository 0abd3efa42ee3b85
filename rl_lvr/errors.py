"""Errors that the command line prints as one line: the user's to mend (exit code 2), or the end of a run (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it."""

    exit_code = 2


class Fault(UserError):  # noqa: N818 - as KeyboardInterrupt
    """A run that was under way had to stop. With several processes, all of them stop at the same place."""

    exit_code = 1


def near_miss(name: object, known: Iterable[str], otherwise: str = ".") -> str:
    """How a sentence about an unknown `name` goes on: the nearest of the `known` ones, or `otherwise`."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise
