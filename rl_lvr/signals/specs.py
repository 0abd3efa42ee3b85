"""Names and parameters of signals, as a recipe writes them -> checked specs."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rl_lvr.errors import UserError, near_miss
from rl_lvr.ops.vocab_stats import MAX_TOP_K
from rl_lvr.signals import attention, confidence, vectors
from rl_lvr.signals.forward import Column
from rl_lvr.signals.probe import Reading
from rl_lvr.signals.regions import Queries

Needs = Literal["mass", "image_entropy", "vocabulary", "vectors"]

_NEEDS: dict[Callable[..., Column], Needs] = {
    attention.attention_mass: "mass",
    attention.attention_mass_paper_b: "mass",
    attention.attention_relative: "mass",
    attention.attention_relative_paper_b: "mass",
    attention.attention_without_sink: "mass",
    attention.image_attention_entropy_difference: "image_entropy",
    confidence.latent_entropy: "vocabulary",
    confidence.latent_top_k_mass: "vocabulary",
    confidence.latent_confidence: "vocabulary",
    confidence.entropy_drop: "vocabulary",
    confidence.confidence_progression: "vocabulary",
    confidence.confidence_reward: "vocabulary",
    confidence.end_at_first_slot: "vocabulary",
    vectors.latent_norm: "vectors",
    vectors.latent_image_cosine: "vectors",
    vectors.latent_span_cosine: "vectors",
}
SIGNALS: dict[str, Callable[..., Column]] = {function.__name__: function for function in _NEEDS}
"""All signals by name. The definition of each is its docstring."""
_PAPER_B = (attention.attention_mass_paper_b, attention.attention_relative_paper_b)
_RENAMED = {
    "latent_cosine": "latent_span_cosine (paper C's collapse is the metric latent/collapse, docs/signals.md)",
}


@dataclass(frozen=True)
class SignalSpec:
    """One signal with its parameters."""

    name: str
    """Of the column: the signal's own, unless the recipe gives another."""
    function: Callable[..., Column]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        return _NEEDS[self.function]

    @property
    def reading(self) -> Reading | None:
        """What the probe has to read for it."""
        if self.needs not in ("mass", "image_entropy"):
            return None
        if self.function in _PAPER_B:
            return Reading("mass", attention.PAPER_B_LAYERS)
        return Reading(self.needs, self.parameters.get("layers"), self.parameters.get("heads"))

    @property
    def queries(self) -> Queries:
        """The rows whose attention it reads."""
        given: Queries = "paper_b" if self.function in _PAPER_B else self.value("queries") or "after"
        return given

    def value(self, name: str) -> Any:
        """A parameter, given or default; None if the signal has no such parameter."""
        parameters = inspect.signature(self.function).parameters
        return self.parameters.get(name, parameters[name].default) if name in parameters else None


def parse_signals(entries: Sequence[str | Mapping[str, Any]]) -> list[SignalSpec]:
    """Signals from a recipe: `"attention_mass"`, or `{"attention_mass": {"layers": [0], "name": "mass_0"}}`.

    `name` renames the column, so that one signal can be measured in several ways.
    """
    specs = [_parse(entry) for entry in entries]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two signals are called {twice[0]!r}: give one of them another with name: ... .")
    return specs


def _parse(entry: str | Mapping[str, Any]) -> SignalSpec:
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, given),) = entry.items()
    elif isinstance(entry, str):
        name, given = entry, {}
    else:
        raise UserError(f"a signal is a name, or a name with its parameters; not {entry!r}.")
    if name in _RENAMED:
        raise UserError(f"signal {name!r} is now called {_RENAMED[name]}: rename it.")
    if name not in SIGNALS:
        raise UserError(f"no signal {name!r}{near_miss(name, SIGNALS)} Signals: {', '.join(SIGNALS)}.")
    if not isinstance(given, Mapping):
        raise UserError(f"signal {name!r}: its parameters are {given!r}; write them as name: value.")
    function = SIGNALS[name]
    types_ = {key: hint for key, hint in get_type_hints(function).items() if key not in ("f", "return")}
    parameters = {}
    column = name
    for key, value in given.items():
        if key == "name":
            if not isinstance(value, str) or not value.isidentifier():
                raise UserError(
                    f"signal {name!r}: its name is {value!r}; a reward takes it as an argument of that name."
                )
            column = value
        elif key not in types_:
            known = ", ".join([*types_, "name"])
            raise UserError(f"signal {name!r} has no parameter {key!r}{near_miss(key, types_)} Parameters: {known}.")
        else:
            parameters[key] = _checked(f"signal {name!r}: {key}", value, types_[key])
    return SignalSpec(column, function, parameters)


def _checked(what: str, value: Any, hint: Any) -> Any:
    """`value` as the type that a signal's annotation asks for."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"{what} is {value!r}; choose {', '.join(get_args(hint))}.")
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOP_K:
            raise UserError(f"{what} is {value!r}; it must be a whole number above 0, at most {MAX_TOP_K}.")
        return value
    if get_origin(hint) in (Union, types.UnionType):  # tuple[int, ...] | None
        if value is None:
            return None
        if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
            return tuple(value)
        raise UserError(f"{what} is {value!r}; it must be a list of whole numbers, or left out for all.")
    raise UserError(f"{what} is {value!r}; it must be a number.")
