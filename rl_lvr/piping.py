"""What a command prints, when its output is no screen: a reader that leaves early, an encoding that lacks a letter."""

from __future__ import annotations

import functools
import io
import os
import sys
from argparse import Namespace
from collections.abc import Callable

SIGPIPE = 128 + 13
"""The exit code of a program that its reader left, as shells know it."""


def pipeable(run: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
    """A command that ends quietly when its reader has enough (`| head`); what cannot be encoded is shown as escapes."""

    @functools.wraps(run)
    def piped(args: Namespace) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = run(args)
            sys.stdout.flush()  # here, and not when Python ends and nobody can catch it
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SIGPIPE
        return code

    return piped
