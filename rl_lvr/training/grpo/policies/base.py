"""A latent policy: how rollouts explore latents, what the policy pass is fed, and the latents' own loss.

A policy of your own is a subclass. A recipe names it by an entry point of the group `rl_lvr.latent_policies`, as
`package.module:Class`, or as `path/file.py:Class` (docs/grpo.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from trl import GRPOConfig

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.density import Law
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.rollout.types import Capability, Sampling


@dataclass(frozen=True)
class PassInputs:
    """The inputs of one forward of a policy or reference pass, for rows [B]."""

    model: nn.Module
    ids: Tensor
    """[B, T]"""
    mask: Tensor
    """[B, T], 1 at real tokens."""
    images: dict[str, Tensor]
    start: int
    """The position at which completions begin; latents before it belong to prompts."""
    markers: FormatIds


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
    """The loss, and sums over the chosen latents for the log."""

    loss: Tensor
    count: Tensor
    clipped: Tensor
    ratio: Tensor
    divergence: Tensor


OF_POLICIES = {
    **dict.fromkeys(
        ("latent_weight", "latent_scale", "latent_epsilon", "latent_epsilon_high"), "latents have no loss of their own"
    ),
    "latent_gradient_clip": "no gradient flows along the latents",
}
"""Settings of `LatentGRPOConfig` that some policies read, and why they have no effect with the others."""


class LatentPolicy:
    """Latents are fixed inputs of the policy pass. Subclasses override what differs.

    A run has one policy, which the trainer asks for the latents of each pass and for their loss. Arguments of a
    subclass's constructor besides `config` are options: `latent_policy_options` of a recipe sets them.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    """Those of `OF_POLICIES` that it reads. Others are refused."""
    law: ClassVar[Law] = "gaussian"
    """Of the exploration noise in rollouts, whose standard deviation is `latent_sigma`."""
    noise_capability: ClassVar[Capability] = Capability.NOISE
    """What an engine must be able to do to draw it."""
    has_loss: ClassVar[bool] = False
    """Whether `loss` is called. Policy and reference passes return the means of latents then."""
    recomputes: ClassVar[bool] = False
    """Whether `latents` is called; else passes are fed what the rollouts recorded."""
    has_gradient: ClassVar[bool] = True
    """Whether the loss depends on latents through parameters. A feedback map is frozen where it does not."""

    def __init__(self, config: GRPOConfig) -> None:
        self.config = config
        self.name = config.latent_policy

    def check(self) -> None:
        """Refuse settings that the policy cannot work with."""

    def check_format(self, latent_format: LatentFormat, hidden_size: int) -> None:
        """Refuse a latent format that the policy cannot work with."""
        if self.has_gradient and latent_format.feedback == "none":
            raise UserError(
                f"latent format {latent_format.name!r} generates no latents, so latent_policy {self.name} has nothing "
                "to price: use context."
            )

    def check_dropout(self, name: str, probability: float) -> None:
        """Refuse dropout, which is active in the policy pass alone, where its latents are compared with recorded ones.

        Args:
            name: The setting that the probability comes from.
        """
        if self.has_gradient and probability > 0:
            raise UserError(
                f"latent_policy {self.name} holds latents of the policy pass against those of the rollout, and {name} "
                f"({probability:g}) changes them in training alone: set {name} to 0."
            )

    def explored(self, sampling: Sampling) -> Sampling:
        """Return `sampling` with the exploration noise of training rollouts."""
        return replace(sampling, sigma=self.config.latent_sigma, noise=self.law)

    def latents(self, recorded: LatentBatch, inputs: PassInputs) -> LatentBatch:
        """Return the latents to feed in a policy or reference pass, in place of those `recorded` by the rollouts."""
        raise NotImplementedError

    def loss(self, actions: LatentActions) -> LatentLoss:
        """Return the latents' own loss, a mean over rows."""
        raise NotImplementedError
