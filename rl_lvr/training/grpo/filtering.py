"""Generation batches and rows that teach nothing: noticed, and left out of the policy pass.

Rows without an advantage add nothing to the loss, and nothing to its gradient. A group whose rewards are all equal is
such a case. What the loss is made of is put back in full length, so that every mean and every normaliser of TRL stays
what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from rl_lvr.errors import Fault, UserError
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.runs.moments import Moment, Part

_log = logging.getLogger(__name__)


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


class Idle(Part):
    """Counts generation batches in a row that teach nothing: in every group all rewards are the same."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.count = 0
        self._warned = False

    def note(self, learns: bool) -> None:
        """`learns`: whether any advantage of any process is not zero."""
        self.count = 0 if learns else self.count + 1
        if self.most is not None and self.count >= self.most:
            raise Fault(
                f"in {self.count} generation batches in a row no group's rewards differed, so nothing was learned: "
                "look at them (rl-lvr rollouts show), raise temperature or num_generations, or raise max_idle_steps."
            )
        if self.count and not self._warned:
            self._warned = True
            _log.warning("no group's rewards differ in this generation batch, so it teaches nothing (said once)")

    def now(self, moment: Moment) -> None:
        moment.counters["idle"] = self.count

    def take(self, moment: Moment) -> None:
        self.count = moment.counters["idle"]


class Unopened:
    """Notices generation batches in a row in which no completion opened a span: latents are not trained then."""

    PATIENCE = 2
    """Batches."""

    def __init__(self) -> None:
        self._count = 0
        self._seen = False
        self._said: set[bool] = set()

    def note(self, rate: float) -> str | None:
        """What to say about `latent/rate` of a batch, over all processes; each of two sentences comes once."""
        self._count = 0 if rate > 0 else self._count + 1
        self._seen = self._seen or rate > 0
        if self._count < self.PATIENCE or self._seen in self._said:
            return None
        self._said.add(self._seen)
        what = "the model no longer starts a latent span" if self._seen else "the model never starts a latent span"
        return (
            f"{what}: latent/rate was 0 in {self._count} generation batches in a row, so no latent takes part in the "
            "training. Begin with a checkpoint that latent SFT has taught to open spans, raise temperature, or reward "
            "answers with latents (on_rollout: {without_latents: stop} ends such a run)."
        )
