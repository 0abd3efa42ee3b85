"""Rewards of a recipe: found, given their options, weighed and guarded, ready to be handed to TRL.

A reward is a plain TRL function. What it needs beyond text it names: `signals` of the forward pass, and columns that
the trainer makes (docs/rewards.md). Torch is not imported here.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError, exits_refused, near_miss
from rl_lvr.plugins import Found, Kind, find, located
from rl_lvr.training.rewards.call import guard
from rl_lvr.training.rewards.options import FROM_TRAINER, options_of, signal_names, taken, with_options

if TYPE_CHECKING:
    from trl import GRPOConfig

REWARD = Kind("reward", "rl_lvr.rewards")
KEYS = ("name", "label", "weight", "schedule", "signals", "options", "on_error", "timeout")
TIMEOUT = 300.0
NECESSITY = ("necessity_completions", "necessity_continuations")
MADE_BY_TRAINER = {
    "spans": "per completion a list of spans (rl_lvr.rollout.record.span_facts)",
    "group": "a number that the completions of one prompt share",
    "stop_reason": "eos, stop or length",
    "markers": "per completion start and end for each marker token of its prompt and itself, in order",
    "necessity_completions": "per completion the text that was rolled out without its latents, None without a span",
    "necessity_continuations": "of that text what follows the first pair of markers, None where END closes no span",
}
"""Columns beside the data's and the signals' that a reward may take; the trainer makes those that one of them takes."""


@dataclass(frozen=True)
class Schedule:
    """A factor on a reward's weight: `first` up to step `begin`, then a straight line to `last` over `steps` steps."""

    first: float = 1.0
    last: float = 1.0
    begin: int = 0
    steps: int = 0

    def at(self, step: int) -> float:
        if step <= self.begin and self.steps:
            return self.first
        share = 1.0 if not self.steps else min(1.0, (step - self.begin) / self.steps)
        return self.first + (self.last - self.first) * share


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a recipe."""

    name: str
    """In logs, unique within a run; also the function's `__name__`, by which TRL names its metrics."""
    where: str
    """Where it was found, for people."""
    function: Any
    """A function of TRL's signature, guarded if `load_rewards` made it, or a reward model or its path."""
    weight: float
    schedule: Schedule
    signals: tuple[Any, ...]
    """Entries for `rl_lvr.signals.parse_signals`; each arrives as a column of its name."""
    takes: frozenset[str]
    """Names of the columns that it takes, signals included."""
    needs: frozenset[str]
    """Columns of the data without which it cannot be called."""
    doc: str

    def weight_at(self, step: int) -> float:
        return self.weight * self.schedule.at(step)


def load_rewards(entries: Sequence[str | Mapping[str, Any]], beside: Path | None = None) -> list[RewardSpec]:
    """The rewards of a recipe, in its order: each a name, or a mapping with some of `KEYS` (or that as JSON text).

    Files are looked for from here, and then in the folder `beside`: the recipe's.
    """
    if isinstance(entries, str | Mapping):
        raise UserError("rewards must be a list: write each below the other, with a dash.")
    specs = []
    for entry in entries:
        fields = _fields(entry)
        # Importing it, constructing it and looking at its signature all run code of the user's.
        with exits_refused(f"reward {fields['name']!r}"):
            specs.append(_load(fields, beside))
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two rewards are called {twice[0]!r}: give one of them another with label: ... .")
    return specs


def signals_of(specs: Sequence[RewardSpec]) -> list[Any]:
    """All signals that the rewards need, each once; one name for two different measurements is refused."""
    entries: dict[str, tuple[Any, str]] = {}
    for spec in specs:
        for entry in spec.signals:
            (column,) = signal_names([entry])
            known, owner = entries.setdefault(column, (entry, spec.name))
            if known != entry:
                raise UserError(
                    f"rewards {owner!r} and {spec.name!r} both call a signal {column!r} but measure it differently: "
                    "rename one with name: ... ."
                )
    return [entry for entry, _ in entries.values()]


def weights_at(specs: Sequence[RewardSpec], step: int) -> list[float]:
    """The weights of all rewards at a step of training: what TRL's `reward_weights` should hold there."""
    return [spec.weight_at(step) for spec in specs]


def require_whole_groups(specs: Sequence[RewardSpec], args: GRPOConfig) -> None:
    """Refuse a reward that takes `group` where a group is shared by processes, each of which sees its own rows only.

    `args` are those of the trainer (TRL's GRPOConfig, which sees to it that all processes together hold whole groups).
    """
    batch = args.per_device_train_batch_size * args.steps_per_generation
    places = [(batch, args.num_generations, "per_device_train_batch_size x steps_per_generation", "num_generations")]
    if args.eval_strategy != "no":
        size, setting = args.num_generations, "num_generations"
        if args.num_generations_eval:
            size, setting = args.num_generations_eval, "num_generations_eval"
        places.append((args.per_device_eval_batch_size, size, "per_device_eval_batch_size", setting))
    for rows, size, of_rows, of_size in places:
        taker = next((spec for spec in specs if "group" in spec.takes), None)
        if taker is not None and rows % size:
            raise UserError(
                f"reward {taker.name!r} compares the completions of a group, but each of the {args.world_size} "
                f"processes holds {rows} completions ({of_rows}), no whole groups of {size} ({of_size}): make the one "
                "a multiple of the other, or leave the reward out."
            )


def _load(fields: Mapping[str, Any], beside: Path | None) -> RewardSpec:
    name = fields["name"]
    found = find(REWARD, name, beside)
    options = fields.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"reward {name!r}: options are {options!r}; write them as name: value.")
    label = fields.get("label", found.name)
    if not isinstance(label, str) or not label.replace("-", "_").isidentifier():
        raise UserError(f"reward {name!r}: label is {label!r}; it must be a word.")
    on_error = fields.get("on_error", "stop")
    if on_error not in ("stop", "exclude"):
        raise UserError(f"reward {name!r}: on_error is {on_error!r}; choose stop or exclude.")
    # What has a timeout of its own, as the judge per attempt, knows better than a limit on the whole batch.
    timeout = fields.get("timeout", None if "timeout" in options_of(found.target) else TIMEOUT)
    if timeout is not None and not (_finite(timeout) and timeout > 0):
        raise UserError(f"reward {name!r}: timeout is {timeout!r}; it must be a number of seconds above 0, or null.")
    weight = fields.get("weight", 1.0)
    if not _finite(weight):
        raise UserError(f"reward {name!r}: weight is {weight!r}; it must be a number.")
    reward = with_options(found.target, options, f"reward {name!r}")
    if not callable(reward):
        raise UserError(f"reward {name!r} is a class whose objects cannot be called: give it __call__.")
    signals = _signals(name, reward, found, fields.get("signals", ()), beside)
    function = guard(reward, label, signals=signals, on_error=on_error, timeout=timeout)
    schedule = _schedule(name, fields.get("schedule", "constant"))
    return _spec(label, found, reward, function, float(weight), schedule, signals)


def spec_of(function: Callable[..., Any], name: str) -> RewardSpec:
    """A reward function as TRL takes it, called as it is: with a weight of 1 and the signals that it declares."""
    found = Found(name, "reward_funcs", function)
    return _spec(name, found, function, function, 1.0, Schedule(), _signals(name, function, found, (), None))


def _spec(
    name: str,
    found: Found,
    reward: Callable[..., Any],
    function: Callable[..., Any],
    weight: float,
    schedule: Schedule,
    signals: tuple[Any, ...],
) -> RewardSpec:
    """`function` is what is called in place of `reward`, whose signature says what it takes."""
    measured = signal_names(signals)
    columns = taken(reward, measured)
    return RewardSpec(
        name=name,
        where=found.where,
        function=function,
        weight=weight,
        schedule=schedule,
        signals=signals,
        takes=columns.names | measured,
        needs=frozenset(columns.needed) - measured - set(MADE_BY_TRAINER) - FROM_TRAINER,
        doc=first_line(found.target),
    )


def first_line(target: Callable[..., Any]) -> str:
    """The first line of a reward's docstring."""
    return (inspect.getdoc(target) or "").partition("\n")[0]


def _fields(entry: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        try:
            entry = json.loads(entry)
        except ValueError as error:
            raise UserError(f"reward {entry!r} is no valid JSON ({error}).") from error
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise UserError(f"a reward is a name, or a mapping with a name; not {entry!r}.")
    for key in entry:
        if key in KEYS:
            continue
        cure = near_miss(key, KEYS, "; options of the reward itself stand below options.")
        raise UserError(f"reward {entry['name']!r}: unknown key {key!r}{cure} Keys: {', '.join(KEYS)}.")
    return entry


def _signals(name: str, reward: Callable[..., Any], found: Found, given: Any, beside: Path | None) -> tuple[Any, ...]:
    """The reward's own signals and the recipe's, which take the place of its own where the names agree.

    A signal in a file of the folder `beside` is named with that folder: whoever measures it does not know the folder.
    """
    if not isinstance(given, list | tuple):
        raise UserError(f"reward {name!r}: signals are {given!r}; write a list of names.")
    declared = getattr(getattr(reward, "func", reward), "signals", ())
    if not isinstance(declared, list | tuple):
        raise UserError(f"reward {name!r}: {found.where} declares signals {declared!r}; it must be a list of names.")
    replaced = signal_names(given)
    entries = (*(entry for entry in declared if not signal_names([entry]) & replaced), *given)
    if any(not signal_names([entry]) for entry in entries):
        raise UserError(f"reward {name!r}: a signal is a name, or a name with its parameters; not {entries!r}.")
    return tuple(
        located(entry, beside)
        if isinstance(entry, str)
        else {located(str(key), beside): parameters for key, parameters in entry.items()}
        for entry in entries
    )


def _schedule(name: str, given: Any) -> Schedule:
    if given == "constant":
        return Schedule()
    allowed = ("from", "to", "begin", "steps")
    if not isinstance(given, Mapping):
        raise UserError(f"reward {name!r}: schedule is {given!r}; write constant, or from, to and steps.")
    for key in given:
        if key not in allowed:
            raise UserError(f"reward {name!r}: schedule has no {key!r}; it has {', '.join(allowed)}.")
    first, last = given.get("from", 1.0), given.get("to", 1.0)
    begin, steps = given.get("begin", 0), given.get("steps")
    if not (_finite(first) and _finite(last)):
        raise UserError(f"reward {name!r}: schedule goes from {first!r} to {last!r}; both must be numbers.")
    if type(steps) is not int or steps < 1 or type(begin) is not int or begin < 0:
        raise UserError(f"reward {name!r}: schedule needs steps, a whole number above 0, and begin, one from 0.")
    return Schedule(float(first), float(last), begin, steps)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
