"""`rl-lvr sft`: train with supervised latents, from a YAML recipe and flags that override it."""

from __future__ import annotations

import argparse

from rl_lvr import accelerated

HELP = "train with supervised latents (a YAML recipe, and flags that override it)"
PASS_THROUGH = True
"""Flags are the fields of the config classes, which import torch: they are parsed in `run`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Only what must be known before torch is imported."""
    parser.usage = "rl-lvr sft --config RECIPE [--KEY VALUE ...]"
    parser.epilog = (
        "KEY is any key of a recipe, such as train_file, latent_format, latent_k, learning_rate or max_steps: "
        "those of rl-lvr (docs/sft.md), of TRL's SFTConfig and of TRL's ModelConfig. "
        "--resume_from_checkpoint latest goes on with an interrupted run. " + accelerated.HELP
    )


def run(arguments: argparse.Namespace) -> int:
    """Parse, check everything that can be checked without a model, then train."""
    words = accelerated.launch_words("sft", arguments.rest)
    if words is not None:
        accelerated.start(words)

    from trl import ModelConfig

    from rl_lvr.training.runs.folder import run_held
    from rl_lvr.training.runs.recipe import parse_recipe
    from rl_lvr.training.sft.config import SFTRecipe
    from rl_lvr.training.sft.main import train_sft

    (config, model_config), given = parse_recipe([SFTRecipe, ModelConfig], arguments.rest)
    with run_held(config.output_dir, "rl-lvr sft"):
        return train_sft(config, model_config, given)
