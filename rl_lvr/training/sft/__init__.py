"""Latent SFT: recipe, config, trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lvr.training.sft.config import LatentSFTConfig as LatentSFTConfig
    from rl_lvr.training.sft.trainer import LatentSFTTrainer as LatentSFTTrainer


def __getattr__(name: str) -> Any:
    """Import on first use, as `rl_lvr.training.grpo` does."""
    if name == "LatentSFTTrainer":
        from rl_lvr.training.sft.trainer import LatentSFTTrainer

        return LatentSFTTrainer
    if name == "LatentSFTConfig":
        from rl_lvr.training.sft.config import LatentSFTConfig

        return LatentSFTConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
