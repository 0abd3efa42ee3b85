"""`gaussian` and `spherical`: a latent is drawn around f(h), and its density prices it as a token's probability does.

Latent z at position p was drawn around mean f(h) of position p - 1 (Monet's public code compares it with the state at
p, and its rollouts have no noise: `latents/density.py` and `check` leave no room for either).
"""

from __future__ import annotations

import torch

from rl_lvr.errors import UserError
from rl_lvr.latents.density import Scale, check_sigma, divergence, log_density
from rl_lvr.latents.format import LatentFormat
from rl_lvr.training.grpo.policies.base import LatentActions, LatentLoss, LatentPolicy


class Density(LatentPolicy):
    """A clipped ratio of densities for each latent, with the advantage of its completion."""

    settings = ("latent_weight", "latent_scale", "latent_epsilon", "latent_epsilon_high")
    has_loss = True

    def check(self) -> None:
        if self.config.latent_sigma == 0:
            raise UserError(
                f"latent_policy {self.name} needs latent_sigma above 0: a latent without noise equals its "
                "mean, so its density has no slope there and the gradient of a fresh rollout is exactly zero. Set "
                "latent_sigma, or use latent_policy unrolled, which is exact without noise."
            )

    def check_format(self, latent_format: LatentFormat, hidden_size: int) -> None:
        super().check_format(latent_format, hidden_size)
        check_sigma(self.law, self.config.latent_sigma, hidden_size)

    def loss(self, actions: LatentActions) -> LatentLoss:
        """Return the mean over completions of the mean over their latents of -w min(r A, clip(r) A) + beta KL.

        A completion without latents counts as 0, so that splitting a batch into equal parts does not change the sum.
        """
        low = self.config.latent_epsilon
        high = low if self.config.latent_epsilon_high is None else self.config.latent_epsilon_high
        scale: Scale = "sum" if self.config.latent_scale == "sum" else "mean"
        chosen = actions.chosen
        rows = chosen.nonzero(as_tuple=True)[0]
        z, mean, old = actions.values[chosen], actions.means[chosen], actions.old_means[chosen]
        sigma, advantage = actions.sigma[rows], actions.advantages[rows]
        now, before = (log_density(z, m, sigma, self.law, scale) for m in (mean, old))
        ratio = (now - before.detach()).exp()
        clipped = ratio.clamp(1 - low, 1 + high)
        terms = -torch.min(ratio * advantage, clipped * advantage) * actions.weights[rows]
        apart = torch.zeros_like(terms)
        if actions.reference_means is not None:
            apart = divergence(mean, actions.reference_means[chosen], sigma, self.law, scale)
            terms = terms + self.config.beta * apart
        share = 1 / chosen.sum(1).clamp(min=1) / len(chosen)
        outside = ((ratio < 1 - low) & (advantage < 0)) | ((ratio > 1 + high) & (advantage > 0))
        return LatentLoss(
            loss=(terms * share[rows]).sum(),
            count=chosen.sum(),
            clipped=outside.sum(),
            ratio=ratio.detach().sum(),
            divergence=apart.detach().sum(),
        )
