"""A trainer between two steps, without its parameters, optimizer and scheduler; and the parts that it is made of.

Parameters, optimizer and scheduler change once per step, at its end. All else that a step changes on its way there
(random states, metrics, counters, a part's own buffers) is kept as a `Moment` from the end of the step before. So a
step can be given up at any point before its update, and the checkpoint of the last one is still to be had.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Moment:
    """What all parts hold at one moment."""

    counters: dict[str, Any]
    """What JSON can hold; written to a checkpoint."""
    tokens_seen: float
    """Of the trainer's state, which counts while a step is being made."""
    held: dict[str, Any] = field(default_factory=dict)
    """What stays in memory, by part; replaced, never changed in place. A part writes it to files of its own."""
    random: dict[str, Any] = field(default_factory=lambda: random_states())


class Part:
    """Something of a trainer that a step changes and a checkpoint holds. Subclasses override what they have."""

    def now(self, moment: Moment) -> None:
        """Write the present state into `moment`."""

    def take(self, moment: Moment) -> None:
        """Return to the state that `now` wrote."""

    def save(self, folder: Path) -> None:
        """Write files of its own into a checkpoint. Every process calls this."""

    def load(self, folder: Path, moment: Moment | None) -> None:
        """Read them, before `take(moment)`. None where the checkpoint's moments do not fit: `take` does not follow."""


def random_states() -> dict[str, Any]:
    """Return the states of all generators of random numbers."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
