"""Rows without an advantage are left out of the policy pass: they add nothing to the loss, and nothing to its gradient.

A group whose rewards are all equal is such a case. What the loss is made of is put back in full length, so that every
mean and every normaliser of TRL stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from rl_lvr.errors import UserError
from rl_lvr.training.grpo.config import LatentGRPOConfig


def drops_idle(args: LatentGRPOConfig, *, router_loss: bool) -> bool:
    """Whether rows without an advantage may be left out; refused where that is asked for and would change the loss."""
    reasons = {
        "beta": args.beta != 0,
        "entropy_coef or use_adaptive_entropy": bool(args.entropy_coef) or args.use_adaptive_entropy,
        "top_entropy_quantile": args.top_entropy_quantile < 1,
        "the router's auxiliary loss": router_loss,
    }
    against = next((name for name, found in reasons.items() if found), None)
    if args.drop_idle_groups and against is not None:
        raise UserError(
            f"drop_idle_groups leaves out rows that {against} reads, which would change the loss: leave "
            "drop_idle_groups out, and it is used only where it changes nothing."
        )
    return against is None if args.drop_idle_groups is None else args.drop_idle_groups


def level_rows(rewards: Tensor, weights: Tensor, size: int, *, each: bool) -> Tensor:
    """[B] bool, rows of groups of `size` in which no rewards differ; NaN is left out, as of rows that are excluded.

    `rewards` [B, R] of all processes. `each`: every reward is the same in the group, and not only their sum, as where
    each is normalised by itself.
    """
    weights = weights.to(rewards.device)
    if each:
        rewards = rewards[:, weights != 0]
    else:
        unscored = rewards.isnan().all(1, keepdim=True)
        rewards = (rewards * weights).nansum(1, keepdim=True).masked_fill(unscored, torch.nan)
    grouped = rewards.view(-1, size, rewards.shape[1])
    most, least = (grouped.masked_fill(grouped.isnan(), end) for end in (-torch.inf, torch.inf))
    return (most.amax(1) <= least.amin(1)).all(1).repeat_interleave(size)


@dataclass(frozen=True)
class Kept:
    """The rows [b] of a micro-batch of B that the policy pass computes, in their order."""

    rows: Tensor
    mask: Tensor
    """[B] bool, the same."""
    old: Tensor
    """[B, C], the old log-probs: those of rows that were left out, whose ratio is 1 then."""
    weights: Tensor
    """[B, C], tokens that take part in the loss."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Kept:
        """Rows with an advantage. If there are none, or none of them shows an image and others do, the first of those
        is kept too: the same modules run in every process."""
        mask = inputs["advantages"] != 0
        images: Sequence[int] | None = inputs.get("num_images")
        shown = mask.new_tensor([True] * len(mask) if images is None or not any(images) else [n > 0 for n in images])
        if not bool((mask & shown).any()):
            mask = mask.index_fill(0, shown.long().argmax(), True)
        weights = inputs["completion_mask"] * inputs["tool_mask"]
        return cls(mask.nonzero()[:, 0], mask, inputs["old_per_token_logps"], weights)

    def select(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The kept rows of a pass's inputs: tensors and lists by row, image inputs as TRL lays them out."""
        order = self.rows.tolist()
        rowwise = {name: value for name, value in inputs.items() if isinstance(value, Tensor | list)}
        chosen = {
            name: [value[row] for row in order] if isinstance(value, list) else value[self.rows]
            for name, value in split_pixel_values_by_grid(rowwise).items()
        }
        return {**inputs, **unsplit_pixel_values_by_grid(chosen)}

    def spread(self, values: Tensor, others: Tensor) -> Tensor:
        """`values` [b, ...] at their rows, `others` [B, ...] at those that were left out."""
        return others.to(values.dtype).index_copy(0, self.rows, values)

    def spread_pass(self, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Both [B, C] from [b, C]. Rows left out get the mean entropy of the kept ones, so that TRL logs that."""
        kept = self.weights[self.rows]
        mean = ((entropies * kept).sum() / kept.sum().clamp(min=1)).detach()
        return self.spread(logprobs, self.old), self.spread(entropies, mean.expand(self.old.shape))
