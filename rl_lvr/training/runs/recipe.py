"""A YAML recipe plus flags that override it, as TRL's command line does it; wrong keys are refused with a hint.

Recipe keys are the fields of the config dataclasses. The recipe is turned into flags and parsed together with the
ones from the command line, so types and choices are checked in one place and a later flag wins. (TRL's own reading of
a file, `parse_args_and_config`, takes values as they are, and sets environment variables that it names.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from rl_lvr.errors import UserError, near_miss
from rl_lvr.flags import flags, take
from rl_lvr.settings_files import read_yaml, refuse_repeats_in_json
from rl_lvr.training.runs.settings import require_finite_settings

_JSON_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
"""Settings of transformers that may name a file of JSON."""


class _Parser(TrlParser):
    """TRL's parser whose errors are one line instead of a page of usage and `sys.exit`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}.")


def parse_recipe(dataclass_types: Sequence[type], argv: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Instances of the dataclasses, and the merged settings that were given explicitly, for the run's record.

    `argv` may hold `--config FILE`; the remaining flags override the file.
    """
    where, argv = split_config(argv)
    recipe = {} if where is None else read_recipe(where)
    known = {f.name: f for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}
    for key in recipe:
        _check_name(key, known, f"recipe {where}: unknown key")
    overrides: dict[str, str] = {}
    for name, values, words in flags(argv):
        _check_name(words[0].removeprefix("--").partition("=")[0], known, "unknown flag")
        for value in values:
            if value.lstrip().startswith(("{", "[")):
                refuse_repeats_in_json(value, f"--{name}")
        overrides[name] = " ".join(values) or "true"

    given = {**recipe, **overrides}
    for name in _JSON_FILES:
        path = given.get(name)
        if isinstance(path, str) and path.endswith(".json") and Path(path).is_file():
            refuse_repeats_in_json(Path(path).read_text(encoding="utf-8"), f"{name} {path}")

    parser = _Parser(dataclass_types=list(dataclass_types), allow_abbrev=False)
    written, nulls = _as_flags(recipe)
    parser.set_defaults(**dict.fromkeys(nulls))
    try:
        parsed = parser.parse_args_into_dataclasses(args=[*written, *argv], look_for_args_file=False)
    except (ValueError, TypeError) as error:
        # A dataclass's own checks: transformers and TRL raise these with a sentence for the user.
        raise UserError(f"{where or 'flags'}: {' '.join(str(error).split())}") from error
    for settings in parsed:
        require_finite_settings(settings)
    return parsed, given


def split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The path behind `--config`, if it is there, and the other words."""
    if argv and not argv[0].startswith("--"):
        raise UserError(f"{argv[0]!r} stands alone; a recipe is named with --config {argv[0]}.")
    ours, words = take(argv, ("config",))
    return ours.get("config"), words


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no recipe at {path}.")
    try:
        recipe = read_yaml(file.read_text(encoding="utf-8"), f"recipe {path}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise UserError(f"recipe {path} must be a YAML mapping of names to values.")
    return recipe


def _check_name(key: str, known: dict[str, Any], what: str) -> None:
    name = key.replace("-", "_")
    if name in known or (name.startswith("no_") and name[3:] in known):
        return
    raise UserError(f"{what} {key!r}{near_miss(name, known, '')}")


def _as_flags(recipe: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The recipe as command-line flags; keys set to null have no flag and come back by name."""
    flags: list[str] = []
    nulls: list[str] = []
    for key, value in recipe.items():
        if value is None:
            nulls.append(key)
        elif isinstance(value, list):
            flags += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif isinstance(value, dict):
            flags += [f"--{key}", json.dumps(value)]
        else:
            flags.append(f"--{key}={value}")
    return flags, nulls
