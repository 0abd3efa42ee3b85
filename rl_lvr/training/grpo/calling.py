"""How rewards are called: what they are given, what they remember, and one that is constant when a run begins."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rl_lvr.agreement import agreed, from_all
from rl_lvr.errors import UserError
from rl_lvr.training.grpo.columns import texts_of
from rl_lvr.training.grpo.guard import GuardedGRPO
from rl_lvr.training.rewards.constant import Constant
from rl_lvr.training.rewards.load import RewardSpec
from rl_lvr.training.rewards.state import (
    SharedReward,
    StatefulReward,
    packed,
    require_shared,
    state_of,
    unpack,
)
from rl_lvr.training.runs.resuming import Moment

STATE_FILE = "rewards.json"


class RewardedGRPO(GuardedGRPO):
    """The parts of `LatentGRPOTrainer` that call rewards."""

    specs: Sequence[RewardSpec]

    def __init__(self, **more: Any) -> None:
        self._constant = Constant()
        self._names = _distinct([spec.name for spec in self.specs])
        found = {name: state_of(spec.function) for name, spec in zip(self._names, self.specs, strict=True)}
        self._states: dict[str, StatefulReward] = {name: state for name, state in found.items() if state is not None}
        super().__init__(**more)
        require_shared(self._states, self.args.world_size)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """The parent's [B of all processes, R], or the error that a reward raised in some process."""
        rows = self._with_texts(inputs, completion_ids_list)
        rewards = self._without_errors(super()._calculate_rewards(rows, prompts, completions, completion_ids_list))
        self._share_states()
        if self._mode == "train":
            first = {**rows[0], "prompts": prompts[0], "completions": completions[0]}
            first["completion_ids"] = completion_ids_list[0]
            self._note_constant(rewards, first)
        return rewards

    def _with_texts(
        self, inputs: list[dict[str, Any]], completion_ids: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """The rows with their column `texts`. One of the data set stays, if no reward asks for ours."""
        if "texts" in inputs[0]:
            taker = next((spec for spec in self.specs if "texts" in spec.takes), None)
            if taker is None:
                return inputs
            raise UserError(
                f"reward {taker.name!r} takes texts, which the trainer makes, and the data has a column of that name: "
                "rename it."
            )
        texts = texts_of(completion_ids, self._tokenizer, self.markers)
        return [{**row, "texts": text} for row, text in zip(inputs, texts, strict=True)]

    # ---- a reward that is constant

    def _note_constant(self, rewards: Tensor, first: Mapping[str, Any]) -> None:
        """Every process holds the rewards of all, so all count alike; the main one speaks."""
        steps = self.state.max_steps * self.args.gradient_accumulation_steps
        names = _distinct(self.reward_func_names)  # rewards of environments stand last
        takes = [spec.takes for spec in self.specs] + [frozenset[str]()] * (len(names) - len(self.specs))
        given = {
            name: {column: first[column] for column in sorted(taken) or ["completions"] if column in first}
            for name, taken in zip(names, takes, strict=True)
        }
        self._constant.note(
            dict(zip(names, rewards.T.tolist(), strict=True)),
            given,
            batches=math.ceil(steps / (self.args.steps_per_generation * self.num_iterations)),
            speaks=self.is_world_process_zero(),
        )

    # ---- rewards that remember

    def _share_states(self) -> None:
        """Let every reward that shares its state know what all processes found; what evaluation found is dropped."""
        for name, state in self._states.items():
            if isinstance(state, SharedReward):
                part = agreed(f"reward {name!r}: pending() failed", state.pending)
                parts = from_all(part)
                if self._mode == "train":
                    state.merge(parts)

    def _now(self) -> Moment:
        moment = super()._now()
        moment.counters["constant"] = self._constant.state()
        moment.rewards = packed(self._states)
        return moment

    def _take(self, moment: Moment) -> None:
        super()._take(moment)
        if "constant" in moment.counters:
            self._constant.restore(moment.counters["constant"])
        if moment.rewards is not None:
            unpack(moment.rewards, self._states)

    def _save_rng_state(self, output_dir: str) -> None:
        """All processes hold the same states, so one writes them, and a run of any size takes them up."""
        super()._save_rng_state(output_dir)
        if self._states and self.args.should_save:
            (Path(output_dir) / STATE_FILE).write_text(packed(self._states), encoding="utf-8")

    def _load_moment(self, checkpoint: Path) -> None:
        super()._load_moment(checkpoint)
        path = checkpoint / STATE_FILE
        held = path.read_text(encoding="utf-8") if path.is_file() else "{}"
        for name in unpack(held, self._states):
            if self.is_world_process_zero():
                print(f"{checkpoint} holds no state of reward {name!r}: it begins anew", file=sys.stderr)


def _distinct(names: Sequence[str]) -> list[str]:
    """TRL takes several functions of one name: the second is called name_2 here."""
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]
