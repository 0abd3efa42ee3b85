"""`rl-lvr VERB`: reads the verb, imports that verb's module, and turns the user's errors into one line.

A verb lives in rl_lvr/commands/VERB.py. Heavy libraries are imported inside its `run`, so that help is instant.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from rl_lvr import __version__, quiet
from rl_lvr.accelerated import group_ended
from rl_lvr.errors import UserError

VERBS = ("sft", "grpo", "generate", "evaluate", "rewards", "rollouts", "serve", "data", "lab", "doctor")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="rl-lvr", description="Train, improve and examine models that reason in latents."
    )
    parser.add_argument("--version", action="version", version=f"rl-lvr {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"rl_lvr.commands.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(verb)
        verb.set_defaults(run=module.run, pass_through=getattr(module, "PASS_THROUGH", False))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.rest = rest
    if rest and not arguments.pass_through:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet.before_imports()
    try:
        with group_ended():
            return arguments.run(arguments)
    except UserError as error:
        print(f"rl-lvr: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"rl-lvr: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rl-lvr: interrupted.", file=sys.stderr)
        return 130
    except SystemExit as error:
        if error.code:
            raise
        # No verb ends this way: what it ran for the user did, before its work was done.
        traceback.print_exc()
        ended = f"{arguments.verb} was ended by sys.exit({error.code!r}) in code that it ran, see above"
        print(f"rl-lvr: {ended}: remove that from it.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
