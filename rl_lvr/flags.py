"""Words of a command line, `--name value` or `--name=value`, before a parser that knows types. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rl_lvr.errors import UserError


def flags(words: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each flag: its name with underscores, its values, and all its words. Words before the first have the name ""."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    for group in filter(None, groups):
        head = group[0] if group[0].startswith("--") else ""
        name, given, value = head[2:].partition("=")
        yield name.replace("-", "_"), [*([value] if given else []), *(group[1:] if head else group)], group


def take(words: Sequence[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the first value of each of the flags `names` that is there, and the other words."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    for name, values, group in flags(words):
        if name not in names:
            rest += group
            continue
        if name in taken:
            raise UserError(f"--{name} is given twice: keep one of the two.")
        if not values:
            raise UserError(f"{group[0]} needs a value.")
        taken[name] = values[0]
        rest += values[1:]
    return taken, rest
