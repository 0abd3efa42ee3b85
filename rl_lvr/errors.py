"""Errors that the command line prints as one line: the user's to mend (exit code 2), or the end of a run (1)."""


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it."""

    exit_code = 2


class Fault(UserError):  # noqa: N818 - as KeyboardInterrupt
    """A run that was under way had to stop. With several processes, all of them stop at the same place."""

    exit_code = 1
