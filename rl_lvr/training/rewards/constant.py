"""Notices a reward that gives every completion of a run's first generation batches the same value.

Such a reward teaches nothing, and mostly does not read what it believes it reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

BATCHES = 3
"""Generation batches that are looked at; fewer if the run makes fewer."""
_LONGEST = 160
_log = logging.getLogger(__name__)


class Constant:
    """Looks at the first generation batches of a run and names a reward that was constant over all of them, once."""

    def __init__(self) -> None:
        self.batches = 0
        """How many were looked at."""
        self.values: dict[str, float | None] = {}
        """The one value of each reward that was constant so far; None: it scored nothing."""
        self.completions = 0

    def note(
        self,
        scores: Mapping[str, Sequence[float]],
        given: Mapping[str, Mapping[str, Any]],
        *,
        batches: int = BATCHES,
        speaks: bool = True,
    ) -> None:
        """A generation batch: each reward's `scores` of all processes (NaN: not scored), and what it was given for one
        completion, by argument. `batches` is how many the whole run makes, `speaks` whether this process warns."""
        if self.batches >= (last := min(BATCHES, max(batches, 1))):
            return
        still = {name: _only(values) for name, values in scores.items()}
        self.values = {
            name: value[0]
            for name, value in still.items()
            if value and (self.batches == 0 or (name in self.values and self.values[name] == value[0]))
        }
        self.batches += 1
        self.completions += max(map(len, scores.values()), default=0)
        if self.batches == last and speaks:
            for name, value in self.values.items():
                _log.warning("%s", self._said(name, value, given.get(name, {})))

    def _said(self, name: str, value: float | None, given: Mapping[str, Any]) -> str:
        gave = "scored none of" if value is None else f"gave {value:g} to each of"
        batches = "the first generation batch" if self.batches == 1 else f"the first {self.batches} generation batches"
        shown = "; ".join(f"{argument} = {shortened(v)} ({type(v).__name__})" for argument, v in given.items())
        return (
            f"reward {name!r} {gave} the {self.completions} completions of {batches}, so nothing is learned from it. "
            f"For one completion it was given {shown or 'no argument'}. If that is not what it reads, fix it and try "
            "it with rl-lvr rewards test (docs/rewards.md)."
        )

    # ---- for a checkpoint

    def state(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"batches": self.batches, "values": dict(self.values), "completions": self.completions}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.batches, self.values = state["batches"], dict(state["values"])
        self.completions = state["completions"]


def shortened(value: Any) -> str:
    """A value in one line, cut in its middle if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 60]} ... {text[-50:]}"


def _only(values: Sequence[float]) -> tuple[float | None] | None:
    """The one value among those that are scored; None if there are several."""
    scored = {value for value in values if not math.isnan(value)}
    if len(scored) > 1:
        return None
    return (scored.pop() if scored else None,)
