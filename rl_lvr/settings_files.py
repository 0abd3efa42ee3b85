"""YAML and JSON that users write, with repeated keys refused: their readers would keep the last value in silence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from rl_lvr.errors import UserError


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, which messages call `where`.

    Raises:
        UserError: If a mapping holds a key twice.
        yaml.YAMLError: If it is not YAML.
    """
    for key, first, second in _repeats(yaml.compose(text, Loader=yaml.SafeLoader), set(), top=True):
        raise UserError(f"{where}: {key!r} stands twice, in lines {first} and {second}: keep one of the two.")
    return yaml.safe_load(text)


def refuse_repeats_in_json(text: str, where: str) -> None:
    """Refuse a JSON text in which an object names a key twice. What is no JSON is left to whoever reads it."""

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: {twice!r} stands twice in one object: keep one of the two.")
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=no_repeats)
    except (json.JSONDecodeError, RecursionError):
        return


def _repeats(node: yaml.Node | None, seen: set[int], *, top: bool = False) -> Iterator[tuple[str, int, int]]:
    """Key and lines of each key that a mapping holds twice. Names at the top may be written with - or with _."""
    if node is None or id(node) in seen:  # an alias stands for a node that was seen
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name = (key.tag, key.value.replace("-", "_") if top else key.value)
                if name in lines:
                    yield key.value, lines[name], line
                lines[name] = line
            yield from _repeats(key, seen)
            yield from _repeats(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeats(value, seen)
