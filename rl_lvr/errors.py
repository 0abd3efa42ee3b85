"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it."""
