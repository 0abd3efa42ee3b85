"""One generation batch: its requests, its rollouts, the carrier of their latents, and the check of their replay."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from rl_lvr.errors import Fault
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.density import Law
from rl_lvr.models import Family
from rl_lvr.rollout.replay import drawn_again
from rl_lvr.rollout.types import Request, Rollout, Sampling, latent_batch
from rl_lvr.signals import Column
from rl_lvr.training.grpo.filtering import Kept
from rl_lvr.training.grpo.scoring import FedModel, own_latents


@dataclass(frozen=True)
class Again:
    """A completion with a span, made once more from its seed with an empty pair of markers for every span."""

    text: str
    continuation: str
    """What follows the first pair."""


@dataclass(frozen=True)
class PolicyPass:
    """What the policy pass of a micro-batch found."""

    logprobs: Tensor
    """[B, C], without gradient."""
    fed: FedModel


@dataclass
class GenerationBatch:
    """The rows of a generation batch on their way from the engine to the loss.

    TRL shuffles and splits a batch between its scoring and the loss: `tensors` and `from_tensors` are the way there.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of the data, with the columns that it has."""
    processor: Any = None
    """What TRL processes the rows with, where that is not the trainer's own processor."""
    requests: list[Request] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    """How rollouts are drawn."""
    rollouts: list[Rollout] = field(default_factory=list)
    excluded: list[bool] = field(default_factory=list)
    """Which rollouts are left out of the loss and of their group."""
    again: list[Again | None] | None = None
    """What came of the same prompts and seeds without latents, where a reward asks for it."""
    made: dict[str, list[Any]] = field(default_factory=dict)
    """Columns made for rewards that are recorded."""

    latents: LatentBatch | None = None
    """The carrier. Positions count in the padded ids; set by the scoring pass, like the two below."""
    old_means: Tensor | None = None
    """[B, N, H], f(h) under the parameters that made the rollouts."""
    columns: dict[str, Column] = field(default_factory=dict)
    """Signals, by name."""
    reference_means: Tensor | None = None

    level: Tensor | None = None
    """[B of all processes] bool, rows of groups in which no rewards differ."""

    in_loss: bool = False
    """Whether it is a micro-batch of the loss."""
    kept: Kept | None = None
    """The rows that the policy pass computes; None for all."""
    policy_pass: PolicyPass | None = None

    def carrier(self, start: int, device: torch.device) -> LatentBatch:
        """Return the latents, positions counted in ids whose prompts are padded on the left to `start` tokens."""
        offsets = torch.tensor([start - len(rollout.prompt_ids) for rollout in self.rollouts])
        return latent_batch(self.rollouts).shifted(offsets).to(device)

    def loss_mask(self) -> list[list[int]]:
        """Return 1 for tokens that take part in the loss: not for forced ones, nor for rollouts that are left out."""
        return [
            (~rollout.forced & (not left_out)).int().tolist()
            for rollout, left_out in zip(self.rollouts, self.excluded, strict=True)
        ]

    def tensors(self, *, with_means: bool) -> dict[str, Tensor]:
        """Return what the loss needs, row by row, for TRL to shuffle and split."""
        assert self.latents is not None
        assert self.old_means is not None
        found = self.latents.as_tensors()
        if with_means:
            found["latent_old_means"] = self.old_means
            if self.reference_means is not None:
                found["latent_reference_means"] = self.reference_means
        return found

    @classmethod
    def from_tensors(cls, inputs: Mapping[str, Any], *, drops_idle: bool) -> GenerationBatch:
        """Return a micro-batch of the loss."""
        return cls(
            latents=LatentBatch.from_tensors(dict(inputs)),
            old_means=inputs.get("latent_old_means"),
            reference_means=inputs.get("latent_reference_means"),
            kept=Kept.of(inputs) if drops_idle else None,
            in_loss=True,
        )


def build_requests(
    family: Family,
    prompt_ids: Sequence[Sequence[int]],
    pictures: Sequence[Sequence[Any] | None] | None,
    inputs: dict[str, Any],
    seed: Callable[[int], int],
) -> list[Request]:
    """One request per prompt. `inputs` are the processor's of all rows, `pictures` what they were made of."""
    shown = [[] for _ in prompt_ids] if pictures is None else [list(row or []) for row in pictures]
    images: list[dict[str, Tensor]] = [{} for _ in prompt_ids]
    if any(shown):
        joined = family.image_inputs({**inputs, "input_ids": [list(ids) for ids in prompt_ids]})
        images = family.split_images(joined, [len(row) for row in shown])
    return [
        Request(
            prompt_ids=list(ids),
            images=images[row],
            pictures=tuple(picture for picture in shown[row] if isinstance(picture, Image)),
            seed=seed(row),
        )
        for row, ids in enumerate(prompt_ids)
    ]


def request_seed(*key: object) -> int:
    """A seed for a key: the run's seed, the step, the row in the whole batch. The same on every resumption."""
    return random.Random(" ".join(map(str, key))).getrandbits(48)


ROW_SHARE = 3
"""In half precision the mean within one rollout may be that much larger than the mean over all of them.

Measured on tiny models of all families with up to 24 layers, bf16 and mixed: honest runs had at most 0.08 in one
rollout and 0.06 over all, two swapped rows 0.75 and more in one rollout, and as little as 0.03 over all.
"""


@dataclass(frozen=True)
class Difference:
    """How far the rollouts are from their replay, over this process's rows."""

    logp: Tensor
    """[4], of the chosen tokens: largest, sum, count, largest mean within one rollout."""
    latent: Tensor
    """[4]: the same for |f(h) - z| / |z| over latents of the model's own."""


def replay_difference(
    rollouts: Sequence[Rollout],
    latents: LatentBatch,
    means: Tensor,
    logprobs: Tensor,
    attention_mask: Tensor,
    law: Law,
) -> Difference:
    """Hold what the engine recorded against the scoring pass. Noise is keyed by seed and position, and drawn again.

    `logprobs` [B, C] and `means` [B, N, H] are the pass's, `attention_mask` [B, T] its mask. Log-probs are compared
    before repetition penalty and cut.
    """
    width = logprobs.shape[1]
    start = attention_mask.shape[1] - width
    recorded, chosen = torch.zeros_like(logprobs), torch.zeros_like(logprobs, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        recorded[row, : len(rollout.logprobs)] = rollout.uncut_logprobs.to(recorded)
        chosen[row, : len(rollout.forced)] = ~rollout.forced.to(chosen.device)
    chosen = chosen & attention_mask[:, start:].bool()
    own = own_latents(latents, start)
    own = own & attention_mask.gather(1, latents.positions.clamp(min=0)).bool()
    rows = own.nonzero(as_tuple=True)[0]
    offsets = torch.tensor([start - len(rollout.prompt_ids) for rollout in rollouts], device=own.device)
    seeds = torch.tensor([rollout.seed for rollout in rollouts], device=own.device)
    z, sigma = latents.values[own], latents.sigma[rows]
    expected = drawn_again(means[own], seeds[rows], latents.positions[own] - offsets[rows], sigma, law)
    expected = expected.to(z.dtype).float()
    apart = (expected - z.float()).norm(dim=-1) / z.float().norm(dim=-1).clamp_min(1e-12)
    off = (recorded - logprobs)[chosen].abs()
    return Difference(_summary(off, chosen.nonzero(as_tuple=True)[0]), _summary(apart, rows))


def _summary(values: Tensor, rows: Tensor) -> Tensor:
    values = values.double()
    if not len(values):
        return values.new_zeros(4)
    sums, counts = (values.new_zeros(int(rows.max()) + 1) for _ in range(2))
    sums.index_add_(0, rows, values)
    counts.index_add_(0, rows, torch.ones_like(values))
    means = sums / counts.clamp(min=1)
    return torch.stack((values.max(), values.sum(), values.new_tensor(len(values)), means.max()))


def require_agreement(found: Mapping[str, float], what: str, tolerance: float, exact: bool) -> None:
    """Stop the run if a replay is too far off. Where precision is full, no single difference may be; in half precision
    single ones are rounding, but neither the mean over all nor the mean within one rollout is."""
    limits = {"largest difference": tolerance}
    if not exact:
        limits = {"mean difference": tolerance, "mean difference within one rollout": ROW_SHARE * tolerance}
    for name, limit in limits.items():
        if not found[name] <= limit:
            raise Fault(
                f"the rollouts do not agree with their replay: the {name} of {what} is {found[name]:.3g}, above "
                f"{limit:g} (replay_tolerance {tolerance:g}). The engine's weights are not the trainer's, or latents "
                "were mixed up on the way; raise replay_tolerance only if rounding explains it."
            )
