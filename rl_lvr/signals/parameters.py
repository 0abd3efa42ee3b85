"""Parameters of signals: which types a definition may annotate, and whether a recipe's value fits."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rl_lvr.errors import UserError

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
WHOLE_NUMBERS = tuple[int, ...]
ALLOWED = "float, int, bool, str, Literal[...] or tuple[int, ...], each also with | None"


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included: `k: Annotated[int, Range(1, 64)]`."""

    lowest: float
    highest: float


def parameters_of(what: str, function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of everything that a recipe may set: all arguments of `function` but the first.

    `what` names the function in messages.

    Raises:
        UserError: If an argument cannot be set by name, or if its annotation is missing or of another type.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        raise UserError(f"{what} takes no pass: its first argument must be the Forward.")
    found = {}
    for parameter in parameters[1:]:
        if parameter.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
            many = str(parameter.replace(annotation=Parameter.empty))
            raise UserError(f"{what} takes {many}, which a recipe cannot name: list its parameters one by one.")
        found[parameter.name] = (_annotation(what, function, parameter), parameter.default)
    return found


def checked(what: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation `hint` asks for; `what` names the parameter in messages."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *bounds = get_args(hint)
        value = checked(what, value, base)
        for bound in bounds:
            if isinstance(bound, Range) and value is not None and not bound.lowest <= value <= bound.highest:
                raise UserError(f"{what} is {value!r}; it must be from {bound.lowest} to {bound.highest}.")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else checked(what, value, _without_none(hint))
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(f"{what} is {value!r}; choose {', '.join(map(str, get_args(hint)))}.")
        return value
    if hint == WHOLE_NUMBERS:
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            return tuple(value)
        raise UserError(f"{what} is {value!r}; it must be a list of whole numbers, or left out.")
    fits = type(value) is hint or (hint is float and type(value) is int)
    if not fits or (hint is float and not math.isfinite(value)):
        raise UserError(f"{what} is {value!r}; it must be {PLAIN[hint]}.")
    return float(value) if hint is float else value


def _annotation(what: str, function: Callable[..., Any], parameter: Parameter) -> Any:
    """The annotation of one parameter, evaluated. Those of the pass and of the result may not be evaluable."""
    if parameter.annotation is Parameter.empty:
        raise UserError(f"{what}: its parameter {parameter.name!r} has no annotation; write {ALLOWED}.")
    lone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        hint = get_type_hints(lone, globalns=names, include_extras=True)[parameter.name]
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise UserError(f"{what}: the annotation of {parameter.name!r} cannot be read ({error}): import it.") from error
    if not _allowed(hint):
        raise UserError(f"{what}: its parameter {parameter.name!r} is annotated {parameter.annotation}; use {ALLOWED}.")
    return hint


def _allowed(hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _allowed(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        rest = _without_none(hint)
        return rest is not None and _allowed(rest)
    return origin is Literal or hint == WHOLE_NUMBERS or hint in PLAIN


def _without_none(hint: Any) -> Any:
    """The one member of a union besides None; None where there are more."""
    rest = [member for member in get_args(hint) if member is not type(None)]
    return rest[0] if len(rest) == 1 else None
