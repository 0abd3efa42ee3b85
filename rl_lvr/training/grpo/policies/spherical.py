"""`spherical`: the direction of a latent is drawn, and its length stays."""

from __future__ import annotations

from rl_lvr.rollout.types import Capability
from rl_lvr.training.grpo.policies.densities import Density


class Spherical(Density):
    law = "spherical"
    noise_capability = Capability.SPHERICAL_NOISE
