"""The latents' own term of the loss, beside TRL's loss of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rl_lvr.training.grpo.batch import GenerationBatch
from rl_lvr.training.grpo.policies import LatentActions, LatentPolicy
from rl_lvr.training.grpo.scoring import own_latents
from rl_lvr.training.runs.metrics import Metrics


def latent_term(
    policy: LatentPolicy,
    batch: GenerationBatch,
    inputs: Mapping[str, Any],
    off_policy_threshold: float | None,
    metrics: Metrics,
) -> Tensor:
    """Return the policy's loss of a micro-batch.

    Args:
        inputs: TRL's, of the same rows.
        off_policy_threshold: TRL's `off_policy_mask_threshold`.
    """
    assert batch.latents is not None
    assert batch.old_means is not None
    assert batch.policy_pass is not None
    latents, means = batch.latents, batch.policy_pass.fed.means
    real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    chosen = own_latents(latents, inputs["prompt_ids"].shape[1]) & (latents.sigma > 0)[:, None]
    chosen = chosen & real.gather(1, latents.positions.clamp(min=0)).bool()
    chosen = chosen & inputs["tool_mask"].bool().any(1, keepdim=True)  # not of a rollout that is left out
    if batch.kept is not None:
        chosen = chosen & batch.kept.mask[:, None]
        means = batch.kept.spread(means, torch.zeros_like(latents.values))
    actions = LatentActions(
        values=latents.values,
        chosen=chosen,
        sigma=latents.sigma,
        means=means,
        old_means=batch.old_means,
        reference_means=batch.reference_means,
        advantages=inputs["advantages"],
        weights=_row_weights(inputs, batch.policy_pass.logprobs, off_policy_threshold),
    )
    found = policy.loss(actions)
    count = int(found.count)
    for name, value in (("clip_ratio", found.clipped), ("ratio", found.ratio)):
        metrics.add_mean(f"latent/{name}", float(value), count)
    if policy.config.beta:
        metrics.add_mean("latent/kl", float(found.divergence), count)
    metrics.add_mean("latent/loss", float(found.loss.detach()), 1)
    return found.loss


def _row_weights(inputs: Mapping[str, Any], logprobs: Tensor, off_policy_threshold: float | None) -> Tensor:
    """Return [B], what TRL multiplies the policy loss of a row with (`per_token_loss * off_policy_mask`, `*
    importance_sampling_ratio`). Ratios of single tokens enter by their mean: a row whose tokens are masked is."""
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    weights: Tensor = (inputs["importance_sampling_ratio"] * mask).sum(1) / mask.sum(1).clamp(min=1)
    if off_policy_threshold is None:
        return weights
    off_policy = GRPOTrainer.get_off_policy_mask(
        advantages=inputs["advantages"][:, None],
        per_token_logps=logprobs,
        sampling_per_token_logps=inputs["sampling_per_token_logps"],
        mask=mask,
        off_policy_threshold=off_policy_threshold,
    )
    return weights * off_policy[:, 0]
