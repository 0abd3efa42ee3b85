"""The latents' own loss: a clipped ratio of densities for each latent, with the advantage of its completion.

Latent z at position p was drawn around mean f(h) of position p - 1 (Monet's public code compares it with the state at
p, and its rollouts have no noise: `density.py` and the checks of the configuration leave no room for either).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lvr.latents.density import Law, Scale, divergence, log_density


@dataclass(frozen=True)
class Pricing:
    """How latents are priced."""

    law: Law
    scale: Scale
    low: float
    """The ratio is clipped to 1 - low and 1 + high."""
    high: float
    beta: float
    """Weight of the divergence from the reference."""


@dataclass(frozen=True)
class LatentActions:
    """Latents of B completions as actions. Padding, prompts' latents and those without noise are not `chosen`."""

    values: Tensor
    """[B, N, H]"""
    chosen: Tensor
    """[B, N] bool"""
    sigma: Tensor
    """[B]"""
    means: Tensor
    """[B, N, H], f(h) under the policy, with gradient."""
    old_means: Tensor
    """[B, N, H], under the parameters that made the rollouts."""
    reference_means: Tensor | None
    advantages: Tensor
    """[B]"""
    weights: Tensor
    """[B], of a completion's policy loss (not of its KL): masks and ratios of TRL's corrections."""


@dataclass(frozen=True)
class LatentLoss:
    """Its value, and sums over the chosen latents for the log."""

    loss: Tensor
    count: Tensor
    clipped: Tensor
    ratio: Tensor
    divergence: Tensor


def latent_loss(actions: LatentActions, pricing: Pricing) -> LatentLoss:
    """Mean over completions of the mean over their latents of -w min(r A, clip(r) A) + beta KL.

    A completion without latents counts as 0, so that splitting a batch into equal parts does not change the sum.
    """
    chosen = actions.chosen
    rows = chosen.nonzero(as_tuple=True)[0]
    z, mean, old = actions.values[chosen], actions.means[chosen], actions.old_means[chosen]
    sigma, advantage = actions.sigma[rows], actions.advantages[rows]
    now, before = (log_density(z, m, sigma, pricing.law, pricing.scale) for m in (mean, old))
    ratio = (now - before.detach()).exp()
    clipped = ratio.clamp(1 - pricing.low, 1 + pricing.high)
    terms = -torch.min(ratio * advantage, clipped * advantage) * actions.weights[rows]
    apart = torch.zeros_like(terms)
    if actions.reference_means is not None:
        apart = divergence(mean, actions.reference_means[chosen], sigma, pricing.law, pricing.scale)
        terms = terms + pricing.beta * apart
    share = 1 / chosen.sum(1).clamp(min=1) / len(chosen)
    outside = ((ratio < 1 - pricing.low) & (advantage < 0)) | ((ratio > 1 + pricing.high) & (advantage > 0))
    return LatentLoss(
        loss=(terms * share[rows]).sum(),
        count=chosen.sum(),
        clipped=outside.sum(),
        ratio=ratio.detach().sum(),
        divergence=apart.detach().sum(),
    )
