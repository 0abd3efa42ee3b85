"""Collapse as paper C means it (2605.18445): between samples, not within a span.

It is a figure of many rollouts, so not a column. Paper C mean-pools a sample's latents and compares the pooled vectors
of different samples; 0.80 to 0.98 in its trained models. A model that feeds every image the same varied span is
collapsed, whatever `latent_span_cosine` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Collapse:
    """How alike the pooled latents of different samples are."""

    cosine: float
    """Mean cosine over all pairs of rollouts of different samples; near 1 they have collapsed, 0.0 without a pair."""
    pairs: int


def pooled(latents: Tensor) -> Tensor:
    """[H] fp32, the mean of a rollout's latents [N, H]; zeros where it has none."""
    return latents.float().mean(0) if len(latents) else latents.new_zeros(latents.shape[-1], dtype=torch.float32)


def between_samples(vectors: Tensor, samples: Sequence[int] | Tensor) -> Collapse:
    """Compare pooled latents `vectors` [R, H] of rollouts whose `samples` [R] differ.

    Rollouts of one sample (the completions of one prompt) are not compared with each other, and zero vectors, those of
    rollouts without latents, with none.
    """
    there = vectors.abs().sum(-1) > 0
    units = normalize(vectors[there].double(), dim=-1)
    numbers = torch.as_tensor(samples, device=vectors.device)[there]
    _, sample, counts = numbers.unique(return_inverse=True, return_counts=True)
    # The sum over pairs from the sums over rows: |sum u|^2 = sum |u|^2 + 2 sum over pairs.
    sums = units.new_zeros(len(counts), units.shape[-1]).index_add(0, sample, units)
    total = float(sums.sum(0).square().sum() - sums.square().sum())
    pairs = (len(units) ** 2 - int(counts.square().sum())) // 2
    return Collapse(total / 2 / pairs if pairs else 0.0, pairs)
