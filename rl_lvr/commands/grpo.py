"""`rl-lvr grpo`: policy gradient on rollouts with latents, from a YAML recipe and flags that override it."""

from __future__ import annotations

import argparse

from rl_lvr import accelerated

HELP = "improve a model by its own rollouts and rewards (a YAML recipe, and flags that override it)"
PASS_THROUGH = True
"""Flags are the fields of the config classes, which import torch: they are parsed in `run`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Only what must be known before torch is imported."""
    parser.usage = "rl-lvr grpo --config RECIPE [--KEY VALUE ...]"
    parser.epilog = (
        "KEY is any key of a recipe, such as rewards, latent_policy, engine, num_generations or learning_rate: "
        "those of rl-lvr (docs/grpo.md), of TRL's GRPOConfig and of TRL's ModelConfig. "
        "--resume_from_checkpoint latest goes on with an interrupted run. " + accelerated.HELP
    )


def run(arguments: argparse.Namespace) -> int:
    """Parse, check everything that can be checked without a model, then train."""
    words = accelerated.launch_words("grpo", arguments.rest)
    if words is not None:
        accelerated.start(words)

    from pathlib import Path

    from trl import ModelConfig

    from rl_lvr.training.grpo.config import GRPORecipe
    from rl_lvr.training.grpo.main import train_grpo
    from rl_lvr.training.runs.folder import run_held
    from rl_lvr.training.runs.recipe import parse_recipe, split_config

    (config, model_config), given = parse_recipe([GRPORecipe, ModelConfig], arguments.rest)
    recipe, _ = split_config(arguments.rest)
    with run_held(config.output_dir, "rl-lvr grpo"):
        return train_grpo(config, model_config, given, None if recipe is None else Path(recipe))
