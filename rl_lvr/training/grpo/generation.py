"""How the engine is asked for rollouts: by all processes alike, with what fails agreed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rl_lvr.agreement import agree, agreed, concatenated, largest
from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import Family
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Capability, Request, Rollout, RolloutEngine, Sampling, StopReason
from rl_lvr.training.grpo.batch import GenerationBatch, build_requests, request_seed
from rl_lvr.training.grpo.columns import again_of, has_span
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.policies import LatentPolicy
from rl_lvr.training.grpo.rules import RULES, sort_rollouts
from rl_lvr.training.runs.metrics import Metrics
from rl_lvr.training.runs.stopping import Abandoned, Stopping


def check_engine_of(
    engine: RolloutEngine, markers: FormatIds, config: LatentGRPOConfig, policy: LatentPolicy, *, sharded: bool
) -> None:
    """Refuse an engine that a trainer with these markers and settings cannot learn from."""
    name = type(engine).__name__
    if engine.markers != markers:
        raise UserError(
            f"the engine runs latent format {engine.markers.format.name!r} with other markers or another k than "
            f"the trainer's {markers.format.name!r}: make both from one format and one tokenizer."
        )
    if Capability.WEIGHTS not in engine.capabilities:
        raise UserError(
            f"the engine {name} keeps the weights that it was started with, so the trainer would "
            "learn from rollouts of an old model: use the engine vllm or hf, or server with a weights_folder."
        )
    if config.latent_start != "free" and Capability.LATENT_START not in engine.capabilities:
        raise UserError(
            f"the engine {name} has no control of START, which latent_start {config.latent_start!r} needs: use the "
            "engine hf or vllm, or latent_start free."
        )
    if isinstance(engine, HFRolloutEngine) and sharded and not config.ds3_gather_for_generation:
        raise UserError(
            "under ZeRO-3 the engine hf decodes on gathered weights: leave ds3_gather_for_generation on, or use "
            "the engine vllm."
        )
    if isinstance(engine, HFRolloutEngine) and config.engine_retries:
        raise UserError("engine_retries is for engines in other processes: the engine hf would fail again.")
    if config.latent_sigma and policy.noise_capability not in engine.capabilities:
        raise UserError(f"the engine draws no {policy.law} noise: use the engine hf, or another policy.")


class Generator:
    """The engine of a trainer, which gets the trainer's weights before each step that makes rollouts."""

    def __init__(
        self,
        engine: RolloutEngine,
        family: Family,
        tokenizer: Any,
        config: LatentGRPOConfig,
        sampling: Sampling,
        metrics: Metrics,
        stopping: Stopping,
    ) -> None:
        """`sampling` is that of training. Evaluation explores nothing."""
        self.engine = engine
        self._family, self._sampling = family, sampling
        self._tokenizer, self._config, self._metrics, self._stopping = tokenizer, config, metrics, stopping
        self._synced_step = -1
        self._times: dict[bool, tuple[int, int]] = {}

    def sync(self, model: nn.Module, step: int) -> None:
        """Hand the weights over, once per step."""
        self._stopping.heed()
        if self._synced_step != step:
            self._ask("did not take over the weights", step, lambda: self.engine.sync_weights(model))
            self._synced_step = step

    def fill(
        self,
        batch: GenerationBatch,
        prompt_ids: Sequence[Sequence[int]],
        pictures: Sequence[Sequence[Any] | None] | None,
        inputs: dict[str, Any],
        step: int,
    ) -> None:
        """Make the rollouts of `batch`, one for each prompt, and sort out which of them are left out.

        Seeds do not depend on how many processes there are.

        Args:
            pictures: Of each prompt.
            inputs: What the processor made of all of them.
        """
        training = self._metrics.training
        key = (self._config.seed, "train" if training else "eval", step, self._times_before(step))
        first = self._config.process_index * len(prompt_ids)

        def seed(row: int) -> int:
            return request_seed(*key, first + row)

        batch.requests = build_requests(self._family, prompt_ids, pictures, inputs, seed)
        batch.sampling = self._sampling if training else replace(self._sampling, sigma=0.0)
        batch.rollouts = self.rollouts(batch.requests, batch.sampling, step)
        batch.excluded = self.excluded(batch.rollouts)

    def fill_again(self, batch: GenerationBatch, step: int) -> None:
        """Make each completion with a span anew from its seed, with an empty pair of markers for every span.

        The text is the same up to the first span, for draws are keyed. A completion without a span has none.
        """
        markers = self.engine.markers
        wanted = [row for row, rollout in enumerate(batch.rollouts) if has_span(rollout, markers)]
        batch.again = [None] * len(batch.rollouts)
        if largest(len(wanted))[0]:
            # A process without any span makes one rollout for nothing: what is gathered for it, all must ask for.
            requests = [replace(batch.requests[row], intervention=Intervention.SKIP) for row in wanted or [0]]
            for row, rollout in zip(wanted, self.rollouts(requests, batch.sampling, step), strict=False):
                batch.again[row] = again_of(rollout, self._tokenizer, markers)

    def rollouts(self, requests: list[Request], sampling: Sampling, step: int) -> list[Rollout]:
        """Make them in each process for itself. One that is told to stop does so at once, the others after theirs."""

        def made() -> list[Rollout]:
            try:
                with self._stopping.alone():
                    return self.completed(requests, sampling)
            except Abandoned:
                if self._config.world_size == 1:
                    raise
                return []

        rollouts: list[Rollout] = self._ask("failed", step, made)
        self._stopping.heed()
        return rollouts

    def completed(self, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = self.engine.generate(requests, sampling)
        if len(rollouts) != len(requests):
            raise UserError(f"it made {len(rollouts)} rollouts of {len(requests)} requests")
        return [self._ended(rollout) for rollout in rollouts]

    def excluded(self, rollouts: Sequence[Rollout]) -> list[bool]:
        """Which rollouts are left out, by `on_rollout`; each kind is counted. In evaluation all count."""
        rules = dict.fromkeys(RULES, "keep")
        if self._metrics.training and isinstance(self._config.on_rollout, dict):
            rules = self._config.on_rollout
        kinds, excluded, problem = sort_rollouts(rollouts, self.engine.markers, rules)
        agree(problem)
        mine = [sum(kind in row for row in kinds) for kind in RULES]
        *counts, total = concatenated(torch.tensor([[*mine, len(rollouts)]])).sum(0).tolist()
        for kind, count in zip(RULES, counts, strict=True):
            name = f"rollouts/excluded_{kind}" if rules[kind] == "exclude" else f"rollouts/{kind}"
            self._metrics.add(name, count / total)
        return excluded

    def _times_before(self, step: int) -> int:
        """How often rollouts were made at this step before: a step may take several generation batches."""
        training = self._metrics.training
        last, number = self._times.get(training, (-1, 0))
        number = number + 1 if last == step else 0
        self._times[training] = (step, number)
        return number

    def _ask(self, problem: str, step: int, call: Callable[[], Any]) -> Any:
        """The engine's answer, or a `Fault` in every process."""
        what = f"the engine {type(self.engine).__name__} {problem} after step {step}"
        return agreed(what, call, retries=self._config.engine_retries)

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
