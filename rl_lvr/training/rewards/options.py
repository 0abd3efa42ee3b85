"""The options of a reward: what a recipe may set, and whether what it sets fits."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rl_lvr.errors import UserError, near_miss

FROM_TRAINER = frozenset(
    (
        "prompts",
        "completions",
        "completion_ids",
        "texts",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
        "reward_name",
    )
)
"""Arguments that are never columns of the data."""
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def with_options(target: Callable[..., Any], given: Mapping[str, Any], what: str, **ours: Any) -> Callable[..., Any]:
    """`target` with its options: a function with them bound, or an object of a class constructed with them.

    `what` names it in messages; `ours` are arguments of a class that are no options.
    """
    known = {name: parameter for name, parameter in options_of(target).items() if name not in ours}
    for name in given:
        if name not in known:
            hint = near_miss(name, known)
            raise UserError(f"{what} has no option {name!r}{hint} Options: {', '.join(known) or 'none'}.")
    missing = [n for n, p in known.items() if inspect.isclass(target) and p.default is p.empty and n not in given]
    if missing:
        raise UserError(
            f"{what} needs the option {missing[0]!r}: write it below options (or --option {missing[0]}=...)."
        )
    hints = _hints(target)
    values = {name: _checked(f"{what}: {name}", given[name], hints.get(name, Any)) for name in given}
    if not inspect.isclass(target):
        return functools.partial(target, **values) if values else target
    try:
        built: Any = target(**ours, **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}: {error}") from error
    return built


def options_of(target: Callable[..., Any]) -> dict[str, Parameter]:
    """What a recipe may set: a class's own arguments; of a function those behind `*`, and others with a default."""
    parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if inspect.isclass(target):
        return {p.name: p for p in named}
    signals = signal_names(getattr(target, "signals", ()))
    return {
        p.name: p
        for p in named
        if p.name not in FROM_TRAINER
        and p.name not in signals
        and (p.kind is p.KEYWORD_ONLY or p.default is not p.empty)
    }


@dataclass(frozen=True)
class Taken:
    """The columns that a reward takes, as its signature says."""

    names: frozenset[str]
    needed: tuple[str, ...]
    """Those without a default, in their order."""
    everything: bool
    """It takes all other columns too (`**columns`)."""
    options: frozenset[str]
    """Names that no column reaches: options that are bound, and what stands behind `*` with a default."""


def taken(reward: Callable[..., Any], signals: Collection[str]) -> Taken:
    """`signals` are columns, whatever the signature says of them."""
    parameters = inspect.signature(reward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    bare, bound = reward, frozenset[str]()
    if isinstance(reward, functools.partial):  # in whose signature all parameters after a bound one are keyword-only
        bare, bound = reward.func, frozenset(reward.keywords)
    own = inspect.signature(bare).parameters.values()
    options = bound | {p.name for p in own if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    options -= FROM_TRAINER | set(signals)
    return Taken(
        names=frozenset(p.name for p in named if p.name not in options),
        needed=tuple(p.name for p in named if p.default is p.empty),
        everything=any(p.kind is p.VAR_KEYWORD for p in parameters),
        options=options,
    )


def signal_names(signals: Sequence[Any]) -> set[str]:
    """The columns that signals arrive in: their names, or the names that their parameters give them.

    A signal named as `package.module:function` or `path/file.py:function` arrives under the function's name.
    """
    names = set()
    for entry in signals:
        if isinstance(entry, str):
            names.add(entry.rpartition(":")[2])
        elif isinstance(entry, Mapping) and len(entry) == 1:
            ((name, parameters),) = entry.items()
            renamed = parameters.get("name") if isinstance(parameters, Mapping) else None
            names.add(str(renamed or str(name).rpartition(":")[2]))
    return names


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations of a user's function need not be evaluable; its values then pass as they are


def _checked(what: str, value: Any, hint: Any) -> Any:
    """`value`, if it fits the annotation; annotations other than plain types and choices of them say nothing."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            near = near_miss(value, map(str, allowed))
            raise UserError(f"{what} is {value!r}{near} Choices: {', '.join(map(str, allowed))}.")
        return value
    if get_origin(hint) in (Union, types.UnionType):
        members = get_args(hint)
        if value is None and type(None) in members:
            return None
        rest = [member for member in members if member is not type(None)]
        return _checked(what, value, rest[0]) if len(rest) == 1 else value
    if hint not in _PLAIN:
        return value
    fits = isinstance(value, hint) or (hint is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{what} is {value!r}; it must be {_PLAIN[hint]}.")
    return float(value) if hint is float else value
