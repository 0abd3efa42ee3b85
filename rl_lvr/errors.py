"""Errors that the command line prints as one line: the user's to mend (exit code 2), or the end of a run (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it."""

    exit_code = 2


class Fault(UserError):  # noqa: N818 - as KeyboardInterrupt
    """A run that was under way had to stop. With several processes, all of them stop at the same place."""

    exit_code = 1


@contextmanager
def exits_refused(what: str) -> Iterator[None]:
    """Around code of users: `sys.exit` in it, or any other exception that is no `Exception`, becomes a `UserError`.

    `what` begins the sentence. Ctrl-C stays what it is.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{what} asked to exit ({error!r}): remove that from it.") from error


def near_miss(name: object, known: Iterable[str], otherwise: str = ".") -> str:
    """How a sentence about an unknown `name` goes on: the nearest of the `known` ones, or `otherwise`."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise
