"""Rewards that remember: what a reward object offers so that its memory survives a resumption and all processes share
it.

A reward has state if it is an object with `state_dict` and `load_state_dict`. In a run of several processes it also
needs `pending` and `merge`, for a question may be answered in one process now and in another one later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rl_lvr.errors import UserError


@runtime_checkable
class StatefulReward(Protocol):
    """A reward whose state is written to every checkpoint. All of it must be what JSON can hold."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class SharedReward(StatefulReward, Protocol):
    """A reward whose state changes only in `merge`, after each generation batch, in every process alike."""

    def pending(self) -> Any:
        """What its calls since the last `pending` found, to be sent to all processes."""

    def merge(self, parts: Sequence[Any]) -> None:
        """Take over what all processes found, in their order. Not called for what was found in evaluation."""


def state_of(reward: Any) -> StatefulReward | None:
    """The object behind `reward` that has state. A module's parameters are none."""
    bare = getattr(reward, "guarded_reward", reward)
    bare = getattr(bare, "func", bare)  # of functools.partial
    bare = getattr(bare, "__self__", bare)  # of a bound method
    if isinstance(bare, type) or hasattr(bare, "named_parameters") or not isinstance(bare, StatefulReward):
        return None
    return bare


def require_shared(states: Mapping[str, StatefulReward], processes: int) -> None:
    """Refuse a reward whose state cannot be written, or would differ from process to process."""
    for name, state in states.items():
        packed({name: state})
        if processes > 1 and not isinstance(state, SharedReward):
            raise UserError(
                f"reward {name!r} has state, which the {processes} processes would keep apart: give it pending() and "
                "merge(parts) (docs/rewards.md), or leave it out."
            )


def packed(states: Mapping[str, StatefulReward]) -> str:
    """The states of all rewards as text, which later changes leave alone."""
    held = {}
    for name, state in states.items():
        given = state.state_dict()
        try:
            held[name] = json.loads(json.dumps(given))
            problem = None if held[name] == given or repr(held[name]) == repr(given) else "it comes back as another"
        except (TypeError, ValueError) as error:
            problem = str(error)
        if problem is not None:
            raise UserError(
                f"reward {name!r}: state_dict() returned what JSON cannot hold ({problem}); return dictionaries with "
                "texts as keys, lists, texts and numbers."
            )
    return json.dumps(held)


def unpack(text: str, states: Mapping[str, StatefulReward]) -> list[str]:
    """Give every reward its state back. Returns the names of those that have none in `text`."""
    held = json.loads(text)
    for name, state in states.items():
        if name in held:
            state.load_state_dict(held[name])
    return [name for name in states if name not in held]
