"""Faults of GRPO, met where they arise: a trainer that asks its engine, its rollouts and its rewards with care.

What is done about each is in `rules.py` and docs/grpo.md; what is kept when a run stops, in `runs/resuming.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.agreement import agree, agreed
from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling, StopReason
from rl_lvr.training.grpo.resuming import ResumableGRPO
from rl_lvr.training.grpo.rules import RULES, sort_rollouts
from rl_lvr.training.rewards.call import watched
from rl_lvr.training.rewards.models import defect_of
from rl_lvr.training.runs.callbacks import Abandoned


class GuardedGRPO(ResumableGRPO):
    """The parts of `LatentGRPOTrainer` that deal with faults."""

    markers: FormatIds | None
    engine: RolloutEngine
    reward_funcs: list[Any]
    _level: Tensor | None
    """[B of all processes] bool, rows of groups in which no rewards differ; of the last generation batch."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._reward_errors: list[Exception] = []
        # Once TRL has named them, and added those of environments. Reward models are modules, and stay so.
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else watched(reward, self._reward_errors)
            for reward in self.reward_funcs
        ]

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _guard_engine(self, engine: RolloutEngine) -> None:
        if isinstance(engine, HFRolloutEngine) and self.args.engine_retries:
            raise UserError("engine_retries is for engines in other processes: the engine hf would fail again.")
        self.engine = engine

    def _ask(self, problem: str, call: Callable[[], Any]) -> Any:
        """The engine's answer, or a `Fault` in every process."""
        what = f"the engine {type(self.engine).__name__} {problem} after step {self.state.global_step}"
        return agreed(what, call, retries=self.args.engine_retries)

    def _rollouts(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        """Made by each process for itself. One that is told to stop does so at once, and the others after theirs."""

        def made() -> list[Rollout]:
            self._alone = True
            try:
                return self._completed(requests, sampling)
            except Abandoned:
                if self.args.world_size == 1:
                    raise
                return []
            finally:
                self._alone = False

        rollouts: list[Rollout] = self._ask("failed", made)
        self._heed()
        return rollouts

    def _completed(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = self.engine.generate(requests, sampling)
        if len(rollouts) != len(requests):
            raise UserError(f"it made {len(rollouts)} rollouts of {len(requests)} requests")
        return [self._ended(rollout) for rollout in rollouts]

    def _ended(self, rollout: Rollout) -> Rollout:
        """TRL reads the last token of every completion. One without any becomes one that ended at once, by no choice of
        its own: of kind `empty`, and without a token in the loss."""
        if rollout.completion_ids:
            return rollout
        return replace(
            rollout,
            completion_ids=(self._tokenizer.eos_token_id,),
            logprobs=torch.zeros(1),
            uncut=None,
            forced=torch.ones(1, dtype=torch.bool),
            stop_reason=StopReason.EOS,
        )

    def _excluded(self, rollouts: list[Rollout]) -> list[bool]:
        """Which rollouts are left out, by `on_rollout`; each kind is counted. In evaluation all count."""
        assert self.markers is not None
        rules: dict[str, str] = self.args.on_rollout if self._mode == "train" else dict.fromkeys(RULES, "keep")
        found, problem = sort_rollouts(rollouts, self.markers, rules)
        agree(problem)
        mine = torch.tensor([[*map(found.count, RULES), len(rollouts)]], device=self.accelerator.device)
        *counts, total = self.accelerator.gather(mine).sum(0).tolist()
        for kind, count in zip(RULES, counts, strict=True):
            name = f"rollouts/excluded_{kind}" if rules[kind] == "exclude" else f"rollouts/{kind}"
            self._metrics[self._mode][name].append(count / total)
        return found.excluded

    def _note_learning(self, mode: str) -> None:
        if mode == "train":
            assert self._level is not None
            self._idle.note(not bool(self._level.all()))
            self._metrics[mode]["rollouts/idle_batches"].append(float(self._idle.count))

    def _without_errors(self, rewards: Tensor) -> Tensor:
        """`rewards`, if no process heard an error from a reward; the calls are over in all of them here."""
        error = self._reward_errors[0] if self._reward_errors else None
        self._reward_errors.clear()
        if error is not None and self.args.world_size == 1:
            raise error
        agree(None if error is None else str(error).rstrip("."), error)
        if (problem := defect_of(rewards, self.reward_funcs, self.reward_func_names)) is not None:
            raise Fault(f"{problem}: check its weights and its pad token.")  # the rewards of all processes: all raise
        self._heed()
        return rewards
