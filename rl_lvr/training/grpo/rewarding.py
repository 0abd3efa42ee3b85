"""How rewards are called: what they are given, what they remember, and one that is constant when a run begins."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.agreement import agree, agreed, from_all, processes
from rl_lvr.errors import Fault, UserError
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.rewards.call import watched
from rl_lvr.training.rewards.constant import Constant
from rl_lvr.training.rewards.load import RewardSpec, weights_at
from rl_lvr.training.rewards.models import defect_of
from rl_lvr.training.rewards.state import (
    SharedReward,
    StatefulReward,
    packed,
    require_shared,
    state_of,
    unpack,
)
from rl_lvr.training.runs.metrics import Metrics
from rl_lvr.training.runs.moments import Moment, Part
from rl_lvr.training.runs.stopping import Stopping

STATE_FILE = "rewards.json"


class Rewards(Part):
    """The rewards of a trainer: their calls, their errors, and the states of those that remember."""

    def __init__(
        self, specs: Sequence[RewardSpec], config: LatentGRPOConfig, metrics: Metrics, stopping: Stopping
    ) -> None:
        self.specs, self._config = specs, config
        self._metrics, self._stopping = metrics, stopping
        self._errors: list[Exception] = []
        self._constant = Constant()
        names = _distinct([spec.name for spec in specs])
        found = {name: state_of(spec.function) for name, spec in zip(names, specs, strict=True)}
        self._states: dict[str, StatefulReward] = {name: state for name, state in found.items() if state is not None}
        require_shared(self._states, config.world_size)

    def watched(self, functions: Sequence[Any]) -> list[Any]:
        """Return TRL's reward functions, whose errors wait until all processes can agree. Models stay as they are."""
        return [f if isinstance(f, nn.Module) else watched(f, self._errors) for f in functions]

    def weigh(self, weights: Tensor, step: int) -> None:
        """Set TRL's `reward_weights` for a step. Those of rewards that environments own come last, and stay."""
        weights[: len(self.specs)] = torch.tensor(weights_at(self.specs, step), dtype=torch.float32)

    def with_texts(self, rows: list[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return the rows with their column `texts`. One of the data set stays, if no reward asks for ours."""
        if "texts" in rows[0]:
            taker = next((spec for spec in self.specs if "texts" in spec.takes), None)
            if taker is None:
                return rows
            raise UserError(
                f"reward {taker.name!r} takes texts, which the trainer makes, and the data has a column of that name: "
                "rename it."
            )
        return [{**row, "texts": text} for row, text in zip(rows, texts, strict=True)]

    def settle(
        self, rewards: Tensor, functions: Sequence[Any], names: Sequence[str], first: Mapping[str, Any], steps: int
    ) -> None:
        """What follows the calls of a generation batch, in all processes.

        Args:
            rewards: [B of all processes, R]
            first: What rewards were given for the first completion.
            steps: How many the run takes.
        """
        self._require_sound(rewards, functions, names)
        self._stopping.heed()
        self._share_states()
        if self._metrics.training:
            self._note_constant(rewards, names, first, steps)

    def _require_sound(self, rewards: Tensor, functions: Sequence[Any], names: Sequence[str]) -> None:
        """Stop in all processes where a reward raised an error in any, or a reward model gave what is not finite."""
        error = self._errors[0] if self._errors else None
        self._errors.clear()
        if error is not None and processes() == 1:
            raise error
        agree(None if error is None else str(error).rstrip("."), error)
        if (problem := defect_of(rewards, functions, names)) is not None:
            raise Fault(f"{problem}: check its weights and its pad token.")  # the rewards of all processes: all raise

    def _share_states(self) -> None:
        """Let every reward that shares its state know what all processes found; what evaluation found is dropped."""
        for name, state in self._states.items():
            if isinstance(state, SharedReward):
                parts = from_all(agreed(f"reward {name!r}: pending() failed", state.pending))
                if self._metrics.training:
                    state.merge(parts)

    def _note_constant(self, rewards: Tensor, names: Sequence[str], first: Mapping[str, Any], steps: int) -> None:
        """Every process holds the rewards of all, so all count alike; the first one warns. Rewards of environments
        stand last among the names."""
        names = _distinct(names)
        takes = [spec.takes for spec in self.specs] + [frozenset[str]()] * (len(names) - len(self.specs))
        given = {
            name: {column: first[column] for column in sorted(taken) or ["completions"] if column in first}
            for name, taken in zip(names, takes, strict=True)
        }
        columns = dict(zip(names, rewards.T.tolist(), strict=True))
        per_batch = self._config.steps_per_generation * self._config.num_iterations
        batches = math.ceil(steps * self._config.gradient_accumulation_steps / per_batch)
        self._constant.note(columns, given, batches=batches, speaks=self._config.process_index == 0)

    # ---- checkpoints. All processes hold the same states, so one writes them, and a run of any size takes them up.

    def now(self, moment: Moment) -> None:
        moment.counters["constant"] = self._constant.state()
        moment.held["rewards"] = packed(self._states)

    def take(self, moment: Moment) -> None:
        if "constant" in moment.counters:
            self._constant.restore(moment.counters["constant"])
        if "rewards" in moment.held:
            unpack(moment.held["rewards"], self._states)

    def save(self, folder: Path) -> None:
        if self._states and self._config.should_save:
            (folder / STATE_FILE).write_text(packed(self._states), encoding="utf-8")

    def load(self, folder: Path, moment: Moment | None) -> None:
        path = folder / STATE_FILE
        held = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        for name in unpack(held, self._states):
            if self._config.process_index == 0:
                print(f"{folder} holds no state of reward {name!r}: it begins anew", file=sys.stderr)


def _distinct(names: Sequence[str]) -> list[str]:
    """TRL takes several functions of one name: the second is called name_2 here."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]
