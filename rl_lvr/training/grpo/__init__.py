"""GRPO with latents: recipe, config, trainer, and what the trainer holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lvr.training.grpo.config import LatentGRPOConfig as LatentGRPOConfig
    from rl_lvr.training.grpo.trainer import LatentGRPOTrainer as LatentGRPOTrainer


def __getattr__(name: str) -> Any:
    """Import on first use: TRL's GRPOTrainer imports vLLM, which takes seconds that a recipe's check does not need."""
    if name == "LatentGRPOTrainer":
        from rl_lvr.training.grpo.trainer import LatentGRPOTrainer

        return LatentGRPOTrainer
    if name == "LatentGRPOConfig":
        from rl_lvr.training.grpo.config import LatentGRPOConfig

        return LatentGRPOConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
