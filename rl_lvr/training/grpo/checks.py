"""What LatentGRPOTrainer checks and counts: settings, engine against model, rollouts against their replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.agreement import agree, concatenated, largest, mean_of_all
from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.starting import LatentStart
from rl_lvr.latents.text import ControlTokens
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.types import RolloutEngine
from rl_lvr.signals import SignalSpec, between_samples, pooled
from rl_lvr.training.grpo.batch import ROW_SHARE, GenerationBatch, replay_difference, require_agreement
from rl_lvr.training.grpo.columns import refuse_columns
from rl_lvr.training.grpo.config import WITH_LATENTS, WITHOUT_LATENTS, LatentGRPOConfig
from rl_lvr.training.grpo.filtering import Unopened
from rl_lvr.training.grpo.generation import Generator
from rl_lvr.training.grpo.policies import policy_of
from rl_lvr.training.grpo.rules import RULES
from rl_lvr.training.grpo.scoring import own_latents
from rl_lvr.training.rewards.load import RewardSpec
from rl_lvr.training.runs.metrics import Metrics
from rl_lvr.training.runs.settings import WITH_FORMAT, WITHOUT_FORMAT, refuse_unused

PARITY_ROWS = 4
RATIO_BAND = (0.9, 1.1)
"""Of the mean importance ratio. Engine and trainer agree to rounding, so it is 1 but for that; within the band the
gradient is at most a tenth too small or too large."""
_log = logging.getLogger(__name__)


class Checks:
    """What a trainer holds its rollouts against, and what it measures of them."""

    def __init__(self, config: LatentGRPOConfig, dtype: torch.dtype, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._exact = dtype in (torch.float32, torch.float64) and not (config.bf16 or config.fp16)
        self._parity_known = not config.parity_check
        self._ratio_noted = False
        self._unopened = Unopened()

    @property
    def tolerance(self) -> tuple[float, bool]:
        """What a replay may be off by, and whether that holds for the largest difference or only for means."""
        given = self._config.replay_tolerance
        return (1e-3 if self._exact else 0.1) if given is None else given, self._exact

    def check_parity(self, batch: GenerationBatch, generator: Generator, model: nn.Module, step: int) -> None:
        """Before the first step: the engine against the model, and a control with SLOT's embeddings for latents.

        In half precision single log-probs say little, and `check_replay` judges by their mean; latents are compared
        with the room that rounding needs.
        """
        with_latents = [row for row, rollout in enumerate(batch.rollouts) if rollout.latent_positions]
        fewest = -largest(-len(with_latents))[0]
        count = min(PARITY_ROWS, fewest)  # as many in every process: under ZeRO-3 each row is a collective
        if self._parity_known or not count:
            return
        self._parity_known = True
        requests = [batch.requests[row] for row in with_latents[:count]]
        sampling = replace(batch.sampling, sigma=0.0)
        rollouts = generator.rollouts(requests, sampling, step)
        report = check_parity(generator.engine, model, requests, sampling, rollouts=rollouts)
        tolerance, exact = self.tolerance
        size = max([1.0, *(float(r.latents.abs().max()) for r in rollouts if len(r.latents))])
        apart = report.max_dh / size / (1 if exact else ROW_SHARE)
        if exact:
            apart = max(apart, report.max_duncut)
        problem = (
            f"the engine does not agree with the model: latents differ by {report.max_dh:.3g}, log-probs by "
            f"{report.max_duncut:.3g}, more than replay_tolerance {tolerance:g} allows; its weights are not the "
            "trainer's"
        )
        agree(None if apart <= tolerance else problem)
        if max(report.control_dh, report.control_dlogp) <= tolerance:
            _log.warning(
                "the model answers the same with SLOT's own embedding in place of every latent (difference %.3g): "
                "parity of engine and trainer says nothing about latents then.",
                max(report.control_dh, report.control_dlogp),
            )

    @torch.no_grad()
    def check_replay(self, batch: GenerationBatch, logprobs: Tensor, attention_mask: Tensor) -> None:
        """The rollouts against the scoring pass, whose log-probs [B, C] and mask [B, T] these are."""
        assert batch.latents is not None
        assert batch.old_means is not None
        found = replay_difference(
            batch.rollouts, batch.latents, batch.old_means, logprobs, attention_mask, batch.sampling.noise
        )
        for name, what, part in (
            ("replay_logp_diff", "log-probs", found.logp),
            ("replay_latent_diff", "latents, relative to their norm", found.latent),
        ):
            everywhere = concatenated(part[None])
            total, count = everywhere[:, 1:3].sum(0).tolist()
            differences = {
                "largest difference": float(everywhere[:, 0].max()),
                "mean difference": total / max(count, 1),
                "mean difference within one rollout": float(everywhere[:, 3].max()),
            }
            for suffix, value in zip(("", "_mean", "_row"), differences.values(), strict=True):
                self._metrics.add(f"latent/{name}{suffix}", value)
            require_agreement(differences, what, *self.tolerance)

    def note(self, batch: GenerationBatch, markers: FormatIds, start: int, group_size: int) -> None:
        """Measure the rollouts: latents of the completions, which begin at `start`, and what cuts kept."""
        assert batch.latents is not None
        latents = batch.latents
        own = own_latents(latents, start)
        counts = own.sum(1)
        norms = latents.values[own].float().norm(dim=-1)
        rate = self._metrics.add_mean("latent/rate", float((counts > 0).sum()), len(counts))
        possible = markers.format.feedback != "none" and not batch.sampling.latent_start.forbidden
        if self._metrics.training and possible:
            warning = self._unopened.note(rate or 0.0)
            if warning is not None and self._config.process_index == 0:
                _log.warning("%s", warning)
        self._metrics.add_mean("latent/count", float(counts.sum()), len(counts))
        self._metrics.add_mean("latent/norm", float(norms.sum()), len(norms))
        vectors = torch.stack([pooled(latents.values[row][own[row]]) for row in range(len(own))])
        everywhere = concatenated(vectors)
        found = between_samples(everywhere, torch.arange(len(everywhere)) // group_size)
        if found.pairs:
            self._metrics.add("latent/collapse", found.cosine)
        # Over the tokens that the loss sees: how much of the distribution top_k, top_p and min_p kept.
        seen = [r for r, left_out in zip(batch.rollouts, batch.excluded, strict=True) if not left_out]
        kept = torch.cat([torch.empty(0), *(r.log_kept_mass[~r.forced].cpu() for r in seen)]).exp()
        self._metrics.add_mean("latent/kept_mass", float(kept.sum()), len(kept))

    def check_ratio(self, output: Mapping[str, Any], *, with_latents: bool) -> None:
        """Warn, once in a run, if the importance-sampling ratio scales the gradient up or down on average.

        The ratio is the one that TRL multiplies the loss with, after its clipping or masking.
        """
        ratio = output.get("importance_sampling_ratio")
        if ratio is None:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        mean = mean_of_all(float((ratio * mask).sum()), int(mask.sum()))
        if mean is None:
            return
        if with_latents:
            self._metrics.add("latent/importance_ratio", mean)
        low, high = RATIO_BAND
        if low <= mean <= high or not self._metrics.training or self._ratio_noted:
            return
        self._ratio_noted = True
        if self._config.process_index == 0:
            _log.warning(
                "the mean importance ratio of the trainer's token probabilities to the engine's is %.3g, outside of "
                "%g to %g, so the policy gradient is scaled by about that much. Likely causes: the engine computes in "
                "another precision than the trainer, it has older weights, or it reports log-probs after a cut "
                "(top_k, top_p, min_p) or a repetition penalty. Remove the cause, or choose another "
                "vllm_importance_sampling_mode or clip range (docs/grpo.md).",
                mean,
                low,
                high,
            )


def refuse_control_tokens(rows: Sequence[Mapping[str, Any]], control: ControlTokens) -> None:
    """A control token in a conversation's text would act as one. A prompt that is one text is taken as it is."""
    problem = None
    for number, row in enumerate(rows):
        messages = row["prompt"]
        if isinstance(messages, str) or (number and messages is rows[number - 1]["prompt"]):
            continue
        found = control.in_messages(messages, "prompt")
        if found is not None:
            name = repr(row["id"]) if "id" in row else f"{number} of this generation batch"
            problem = (
                f"the prompt of record {name}: {found[0]} holds the control token {found[1]!r}, which would act as "
                "one; spell it differently"
            )
            break
    agree(problem)


def refuse_latents(
    args: LatentGRPOConfig, specs: Sequence[RewardSpec], signals: Sequence[SignalSpec], engine: RolloutEngine | None
) -> None:
    """Refuse settings and rewards that a run without latents has nothing for."""
    refuse_unused(args, WITHOUT_LATENTS, WITHOUT_FORMAT)
    if args.on_rollout != RULES:
        raise UserError(f"on_rollout cannot be used {WITHOUT_FORMAT} (rollouts are TRL's): leave it out.")
    if engine is not None:
        raise UserError("an engine is given but no latent format: TRL generates by itself then.")
    if signals:
        raise UserError(f"signal {signals[0].name!r} needs a latent format: leave its reward out.")
    refuse_columns(specs)


def check_settings(args: LatentGRPOConfig, latent_format: LatentFormat, hidden_size: int) -> None:
    """Refuse settings that only TRL's own generation would read, and those that a latent format rules out."""
    refuse_unused(args, WITH_LATENTS, WITH_FORMAT)
    answer, span = args.max_completion_length, latent_format.span_tokens
    if latent_format.length == "fixed" and latent_format.feedback != "none" and answer is not None and answer < span:
        raise UserError(
            f"max_completion_length is {answer}, and a span of k {latent_format.k} takes {span} tokens with its "
            "markers, so none could ever be whole: raise max_completion_length, or set a smaller latent_k."
        )
    start = LatentStart.parse(args.latent_start)
    if latent_format.feedback == "none" and (start.forced or start.biased):
        raise UserError(
            f"latent_start is {args.latent_start!r}, but latent format {latent_format.name!r} generates no latents: "
            "leave latent_start out."
        )
    if not args.temperature > 0:
        raise UserError(f"temperature is {args.temperature}; it must be above 0, or nothing is explored.")
    sequences = args.vllm_importance_sampling_mode.startswith("sequence")
    if args.loss_type == "vespo" and args.vllm_importance_sampling_correction and sequences:
        raise UserError(
            "loss_type vespo needs vllm_importance_sampling_mode token_truncate or token_mask, not "
            f"{args.vllm_importance_sampling_mode}."
        )
    policy_of(args).check_format(latent_format, hidden_size)


def dropout_of(model: nn.Module) -> tuple[str, float]:
    """The largest probability of dropout in the model, and the setting that it comes from."""
    found = [("dropout", 0.0)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found.append(("lora_dropout" if "lora_dropout" in name else "dropout", module.p))
        attention = getattr(module, "attention_dropout", None)
        if isinstance(attention, float):  # else it is a module, and comes by itself
            found.append(("attention_dropout", attention))
    return max(found, key=lambda pair: pair[1])
