"""`context`: latents are fixed inputs; only text is trained."""

from __future__ import annotations

from rl_lvr.training.grpo.policies.base import LatentPolicy


class Context(LatentPolicy):
    has_gradient = False  # nothing in the policy pass depends on a feedback map, and DDP would wait for its gradient
