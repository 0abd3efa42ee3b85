"""What LatentGRPOTrainer checks and counts: settings, engine against model, rollouts against their replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.agreement import agree
from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.latents.text import ControlTokens
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.types import Sampling
from rl_lvr.signals import between_samples, pooled
from rl_lvr.training.grpo.batch import ROW_SHARE, Turn, replay_difference, require_agreement
from rl_lvr.training.grpo.config import WITH_LATENTS, WITHOUT_LATENTS, LatentGRPOConfig
from rl_lvr.training.grpo.filtering import Unopened
from rl_lvr.training.grpo.policies import policy_of
from rl_lvr.training.grpo.rules import RULES
from rl_lvr.training.grpo.scoring import own_latents
from rl_lvr.training.grpo.timing import TimedGRPO
from rl_lvr.training.runs.settings import WITH_FORMAT, WITHOUT_FORMAT, refuse_unused

PARITY_ROWS = 4
RATIO_BAND = (0.9, 1.1)
"""Of the mean importance ratio. Engine and trainer agree to rounding, so it is 1 but for that; within the band the
gradient is at most a tenth too small or too large."""
_log = logging.getLogger(__name__)


class CheckedGRPO(TimedGRPO):
    """The parts of `LatentGRPOTrainer` that check and count."""

    args: LatentGRPOConfig
    sampling: Sampling
    markers: FormatIds | None
    _parity_known: bool
    _ratio_noted: bool

    def _check_parity(self, turn: Turn, sampling: Sampling) -> None:
        """Before the first step: the engine against the model, and a control with SLOT's embeddings for latents.

        In half precision single log-probs say little, and `_check_replay` judges by their mean; latents are compared
        with the room that rounding needs.
        """
        with_latents = [row for row, rollout in enumerate(turn.rollouts) if rollout.latent_positions]
        counts = self.accelerator.gather(torch.tensor([len(with_latents)], device=self.accelerator.device))
        count = min(PARITY_ROWS, int(counts.min()))  # as many in every process: under ZeRO-3 each row is a collective
        if self._parity_known or not count:
            return
        self._parity_known = True
        requests = [turn.requests[row] for row in with_latents[:count]]
        sampling = replace(sampling, sigma=0.0)
        rollouts = self._rollouts(requests, sampling)
        report = check_parity(self.engine, self.model, requests, sampling, rollouts=rollouts)
        tolerance, exact = self._tolerance
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

    def _refuse_control(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A control token in a conversation's text would act as one. A prompt that is one text is taken as it is."""
        problem = None
        for number, row in enumerate(rows):
            messages = row["prompt"]
            if isinstance(messages, str) or (number and messages is rows[number - 1]["prompt"]):
                continue
            found = self._control.in_messages(messages, "prompt")
            if found is not None:
                name = repr(row["id"]) if "id" in row else f"{number} of this generation batch"
                problem = (
                    f"the prompt of record {name}: {found[0]} holds the control token {found[1]!r}, which would act as "
                    "one; spell it differently"
                )
                break
        agree(problem)

    @cached_property
    def _control(self) -> ControlTokens:
        assert self.markers is not None
        return ControlTokens(self._tokenizer, self.markers, self.markers.placeholders)

    @property
    def _tolerance(self) -> tuple[float, bool]:
        """What a replay may be off by, and whether that holds for the largest difference or only for means."""
        exact = self.model.dtype in (torch.float32, torch.float64) and not (self.args.bf16 or self.args.fp16)
        given: float | None = self.args.replay_tolerance
        return (1e-3 if exact else 0.1) if given is None else given, exact

    @torch.no_grad()
    def _check_replay(self, turn: Turn, logprobs: Tensor, attention_mask: Tensor) -> None:
        assert turn.latents is not None
        assert turn.old_means is not None
        found = replay_difference(
            turn.rollouts,
            turn.latents,
            turn.old_means,
            logprobs,
            attention_mask,
            turn.sampling.noise,
        )
        for name, what, part in (
            ("replay_logp_diff", "log-probs", found.logp),
            ("replay_latent_diff", "latents, relative to their norm", found.latent),
        ):
            everywhere = self.accelerator.gather(part[None])
            total, count = everywhere[:, 1:3].sum(0).tolist()
            differences = {
                "largest difference": float(everywhere[:, 0].max()),
                "mean difference": total / max(count, 1),
                "mean difference within one rollout": float(everywhere[:, 3].max()),
            }
            for suffix, value in zip(("", "_mean", "_row"), differences.values(), strict=True):
                self._metrics[self._mode][f"latent/{name}{suffix}"].append(value)
            require_agreement(differences, what, *self._tolerance)

    def _log_latents(self, latents: LatentBatch, start: int, mode: str) -> None:
        own = own_latents(latents, start)
        counts = own.sum(1)
        norms = latents.values[own].float().norm(dim=-1)
        rate = self._add_mean(mode, "latent/rate", float((counts > 0).sum()), len(counts))
        assert self.markers is not None
        if mode == "train" and self.markers.format.feedback != "none":
            warning = self._unopened.note(rate or 0.0)
            if warning is not None and self.accelerator.is_main_process:
                _log.warning("%s", warning)
        self._add_mean(mode, "latent/count", float(counts.sum()), len(counts))
        self._add_mean(mode, "latent/norm", float(norms.sum()), len(norms))
        vectors = torch.stack([pooled(latents.values[row][own[row]]) for row in range(len(own))])
        size = self.num_generations if mode == "train" else self.num_generations_eval
        everywhere = self.accelerator.gather(vectors)
        found = between_samples(everywhere, torch.arange(len(everywhere)) // size)
        if found.pairs:
            self._metrics[mode]["latent/collapse"].append(found.cosine)

    def _log_kept_mass(self, turn: Turn, mode: str) -> None:
        """Over the tokens that the loss sees: how much of the distribution `top_k`, `top_p` and `min_p` kept."""
        seen = [r for r, left_out in zip(turn.rollouts, turn.excluded, strict=True) if not left_out]
        kept = torch.cat([torch.empty(0), *(r.log_kept_mass[~r.forced].cpu() for r in seen)]).exp()
        self._add_mean(mode, "latent/kept_mass", float(kept.sum()), len(kept))

    def _check_ratio(self, output: Mapping[str, Any], mode: str) -> None:
        """Warn, once in a run, if the importance-sampling ratio scales the gradient up or down on average.

        The ratio is the one that TRL multiplies the loss with, after its clipping or masking.
        """
        ratio = output.get("importance_sampling_ratio")
        if ratio is None:
            return
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        mean = self._mean_of_all(float((ratio * mask).sum()), int(mask.sum()))
        if mean is None:
            return
        if self.markers is not None:
            self._metrics[mode]["latent/importance_ratio"].append(mean)
        low, high = RATIO_BAND
        if low <= mean <= high or mode != "train" or self._ratio_noted:
            return
        self._ratio_noted = True
        if self.accelerator.is_main_process:
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

    def _mean_of_all(self, total: float, count: int) -> float | None:
        """A mean over all processes; None where nothing was counted."""
        mine = torch.tensor([[total, count]], dtype=torch.float32, device=self.accelerator.device)
        total, count = self.accelerator.gather(mine).sum(0).tolist()
        return total / count if count else None

    @cached_property
    def _unopened(self) -> Unopened:
        return Unopened()

    def _add_mean(self, mode: str, name: str, total: float, count: int) -> float | None:
        """A metric that is a mean over all processes; nothing where nothing was counted."""
        mean = self._mean_of_all(total, count)
        if mean is not None:
            self._metrics[mode][name].append(mean)
        return mean

    def _add_max(self, mode: str, name: str, value: float) -> None:
        mine = torch.tensor([value], device=self.accelerator.device)
        self._metrics[mode][name].append(float(self.accelerator.gather(mine).max()))


def refuse_latent_settings(args: LatentGRPOConfig) -> None:
    """Refuse settings that a run without latents would not read."""
    refuse_unused(args, WITHOUT_LATENTS, WITHOUT_FORMAT)
    if args.on_rollout != RULES:
        raise UserError(f"on_rollout cannot be used {WITHOUT_FORMAT} (rollouts are TRL's): leave it out.")


def check_settings(args: LatentGRPOConfig, latent_format: LatentFormat, hidden_size: int) -> None:
    """Refuse settings that only TRL's own generation would read, and those that a latent format rules out."""
    refuse_unused(args, WITH_LATENTS, WITH_FORMAT)
    answer, span = args.max_completion_length, latent_format.span_tokens
    if latent_format.length == "fixed" and latent_format.feedback != "none" and answer is not None and answer < span:
        raise UserError(
            f"max_completion_length is {answer}, and a span of k {latent_format.k} takes {span} tokens with its "
            "markers, so none could ever be whole: raise max_completion_length, or set a smaller latent_k."
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
