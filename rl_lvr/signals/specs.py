"""Names and parameters of signals, as a recipe writes them -> checked specs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path
from typing import Any

from rl_lvr.errors import UserError, exits_refused, near_miss
from rl_lvr.plugins import Found, Kind, find, installed
from rl_lvr.signals import attention, confidence, vectors
from rl_lvr.signals.declaring import Needs, declared, needs_of
from rl_lvr.signals.parameters import checked, parameters_of
from rl_lvr.signals.values import Values

SIGNAL = Kind("signal", "rl_lvr.signals")
SIGNALS: dict[str, Callable[..., Values]] = {
    function.__name__: function
    for function in (
        attention.attention_mass,
        attention.attention_mass_paper_b,
        attention.attention_relative,
        attention.attention_relative_paper_b,
        attention.attention_without_sink,
        attention.image_attention_entropy_difference,
        confidence.latent_entropy,
        confidence.latent_top_k_mass,
        confidence.latent_confidence,
        confidence.entropy_drop,
        confidence.confidence_progression,
        confidence.confidence_reward,
        confidence.end_at_first_slot,
        vectors.latent_norm,
        vectors.latent_image_cosine,
        vectors.latent_span_cosine,
    )
}
"""The signals of this package by name. Those of other packages are entry points of the group `rl_lvr.signals`."""
_RENAMED = {
    "latent_cosine": "latent_span_cosine (paper C's collapse is the metric latent/collapse, docs/signals.md)",
}


@dataclass(frozen=True)
class SignalSpec:
    """One signal with its parameters."""

    name: str
    """Of the column: the signal's own, unless the recipe gives another."""
    function: Callable[..., Values]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Those that the recipe gives."""
    where: str = "built in"
    """Where the definition was found, for people."""

    @property
    def needs(self) -> Needs:
        """What it reads of a pass."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
        return needs_of(f"signal {self.name!r}", self.function, {**defaults, **self.parameters})


def parse_signals(entries: Sequence[str | Mapping[str, Any]], beside: Path | None = None) -> list[SignalSpec]:
    """Signals from a recipe: `"attention_mass"`, or `{"attention_mass": {"layers": [0], "name": "mass_0"}}`.

    A signal is named by its short name (those of `SIGNALS`, and entry points of other packages), as
    `package.module:function`, or as `path/file.py:function`. Files are looked for from here, and then in the folder
    `beside`. `name` renames the column, so that one signal can be measured in several ways.

    Raises:
        UserError: If a signal is not found, is not declared (`signal`), or has no such parameter or value.
    """
    specs = [_parse(entry, beside) for entry in entries]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two signals are called {twice[0]!r}: give one of them another with name: ... .")
    return specs


def _parse(entry: str | Mapping[str, Any], beside: Path | None) -> SignalSpec:
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, given),) = entry.items()
    elif isinstance(entry, str):
        name, given = entry, {}
    else:
        raise UserError(f"a signal is a name, or a name with its parameters; not {entry!r}.")
    what = f"signal {name!r}"
    # Importing a module of others, and asking what a function of theirs needs, runs their code.
    with exits_refused(what):
        found = _found(str(name), beside)
        if not isinstance(given, Mapping):
            raise UserError(f"{what}: its parameters are {given!r}; write them as name: value.")
        if not declared(found.target):
            raise UserError(
                f"{what} ({found.where}) is not declared to be one: write @signal(Needs(...)) of rl_lvr.signals above "
                "it."
            )
        column, parameters = _parameters(what, found, given)
        spec = SignalSpec(column, found.target, parameters, found.where)
        _ = spec.needs  # what is wrong with a declaration is said here, and not in a run
    return spec


def _found(name: str, beside: Path | None) -> Found:
    if ":" in name:
        return find(SIGNAL, name, beside)
    others = installed(SIGNAL)
    if name in SIGNALS:
        function = SIGNALS[name]
        if name in others:
            places = [f"{function.__module__}:{name}", *(point.value for point in others[name])]
            raise UserError(f"an installed package has a signal {name!r} too: write {' or '.join(places)}.")
        return Found(name, "built in", function)
    if name in others:
        return find(SIGNAL, name)
    if name in _RENAMED:
        raise UserError(f"signal {name!r} is now called {_RENAMED[name]}: rename it.")
    known = [*SIGNALS, *others]
    raise UserError(
        f"no signal {name!r}{near_miss(name, known)} Signals: {', '.join(known)}. "
        "Your own is named package.module:function or path/file.py:function."
    )


def _parameters(what: str, found: Found, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The column's name, and the parameters that a recipe gives."""
    known = parameters_of(what, found.target)
    column, parameters = found.name, {}
    for key, value in given.items():
        if key == "name":
            column = value
        elif key not in known:
            names = ", ".join([*known, "name"])
            raise UserError(f"{what} has no parameter {key!r}{near_miss(key, known)} Parameters: {names}.")
        else:
            parameters[key] = checked(f"{what}: {key}", value, known[key][0])
    if not isinstance(column, str) or not column.isidentifier():
        raise UserError(f"{what}: its name is {column!r}; a reward takes it as an argument of that name.")
    missing = [key for key, (_, default) in known.items() if default is Parameter.empty and key not in parameters]
    if missing:
        raise UserError(f"{what} needs the parameter {missing[0]!r}: write it below the signal's name.")
    return column, parameters
