"""Recipes: a file, flags that override it, and clear words on what is wrong with either."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import ModelConfig

from rl_lvr.errors import UserError
from rl_lvr.recipe import parse_recipe
from rl_lvr.training.config import LatentSFTConfig

TYPES = [LatentSFTConfig, ModelConfig]
GOOD = "train_file: a.jsonl\noutput_dir: out\nlatent_format: lvr\nlearning_rate: 1e-3\nreport_to: none\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def parse(path: Path, *flags: str):
    return parse_recipe(TYPES, ["--config", str(path), *flags])


def test_flags_override_the_file(recipe: Path) -> None:
    (config, model), given = parse(recipe, "--latent_k", "6", "--learning_rate=0.5", "--use_peft", "true")
    assert (config.latent_k, config.learning_rate, config.latent_format) == (6, 0.5, "lvr")
    assert model.use_peft is True
    assert given["latent_k"] == "6"
    assert given["latent_format"] == "lvr"


def test_numbers_that_yaml_reads_as_text_are_numbers(recipe: Path) -> None:
    (config, _), _ = parse(recipe)
    assert config.learning_rate == 1e-3


def test_lists_and_null(recipe: Path) -> None:
    recipe.write_text(GOOD + "eval_file: b.jsonl\nlatent_eval_conditions: [own, skip]\nstop_at: null\n")
    (config, _), _ = parse(recipe)
    assert config.latent_eval_conditions == ["own", "skip"]
    assert config.stop_at is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("latent_fromat: lvr", "did you mean 'latent_format'"),
        ("max_steps: many", "max_steps"),
        ("oracle: crops", "tokens or crop"),
        ("own_latents: 2", "between 0 and 1"),
        ("latent_objective: mse", "no latent objective 'mse'"),
        ("latent_eval_conditions: [sometimes]", "sometimes"),
        ("latent_eval_steps: 10", "eval_file is missing"),
        ("packing: true", "packing"),
        ("- a list", "YAML"),
        ("a: [", "no valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_line(recipe: Path, line: str, words: str) -> None:
    recipe.write_text(GOOD + line + "\n")
    with pytest.raises(UserError) as error:
        parse(recipe)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_flags_and_missing_files(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'output_dir'"):
        parse(recipe, "--outputdir", "x")
    with pytest.raises(UserError, match="no recipe at"):
        parse(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="needs the path"):
        parse_recipe(TYPES, ["--config"])


def test_required_settings_are_named(recipe: Path) -> None:
    recipe.write_text("output_dir: out\n")
    with pytest.raises(UserError, match="train_file is missing"):
        parse(recipe)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/**/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_parses(path: Path) -> None:
    (config, model), _ = parse(path)
    assert config.train_file
    assert model.model_name_or_path
