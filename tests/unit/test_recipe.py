"""Recipes: a file, flags that override it, and clear words on what is wrong with either."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from trl import GRPOTrainer, ModelConfig

from rl_lvr.accelerated import launch_words
from rl_lvr.errors import UserError
from rl_lvr.training.grpo.config import TRL_CHOICES, GRPORecipe, LatentGRPOConfig
from rl_lvr.training.rewards.load import load_rewards
from rl_lvr.training.runs.recipe import parse_recipe, read_recipe, split_config
from rl_lvr.training.sft.config import LatentSFTConfig, SFTRecipe

TYPES = [SFTRecipe, ModelConfig]
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
    recipe.write_text(
        GOOD + "eval_file: b.jsonl\nlatent_eval_steps: 5\nlatent_eval_conditions: [own, skip]\nstop_at: null\n"
    )
    (config, _), _ = parse(recipe)
    assert config.latent_eval_conditions == ["own", "skip"]
    assert config.stop_at is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("latent_fromat: lvr", "did you mean 'latent_format'"),
        ("max_steps: many", "max_steps"),
        ("oracle: crops", "did you mean 'crop'"),
        ("own_latents: 2", "between 0 and 1"),
        ("latent_objective: mse", "no latent objective 'mse'"),
        ("latent_eval_conditions: [sometimes]", "sometimes"),
        ("latent_eval_steps: 10", "eval_file is missing"),
        ("eval_strategy: steps", "eval_file is missing"),
        ("learning_rate: -1", "0 or more"),
        ("label_smoothing_factor: 0.1", "no latents"),
        ("- a list", "YAML"),
        ("a: [", "no valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_line(recipe: Path, line: str, words: str) -> None:
    name = line.partition(":")[0]
    kept = [row for row in GOOD.splitlines(keepends=True) if not row.startswith(f"{name}:")]
    recipe.write_text("".join(kept) + line + "\n")
    with pytest.raises(UserError) as error:
        parse(recipe)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_both_spellings_of_config_and_a_recipe_without_it(recipe: Path) -> None:
    (config, _), _ = parse_recipe(TYPES, [f"--config={recipe}", "--latent_k", "3"])
    assert config.latent_k == 3
    with pytest.raises(UserError, match="named with --config"):
        parse_recipe(TYPES, [str(recipe)])


def test_weights_over_training(recipe: Path) -> None:
    (config, _), _ = parse(recipe, "--latent_weight=2", "--latent_weight_end=0")
    assert [config.weight_at(p) for p in (0, 0.5, 1)] == [2, 1, 0]
    (config, _), _ = parse(recipe, "--latent_weight=2", "--latent_weight_end=0", "--latent_weight_schedule=cosine")
    assert config.weight_at(0.25) == pytest.approx(1 + 2**-0.5)
    (config, _), _ = parse(recipe, "--latent_weight=2", "--latent_weight_schedule=constant")
    assert config.weight_at(0.9) == 2


def test_unknown_flags_and_missing_files(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'output_dir'"):
        parse(recipe, "--outputdir", "x")
    with pytest.raises(UserError, match="no recipe at"):
        parse(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="--config needs a value"):
        parse_recipe(TYPES, ["--config"])


def test_required_settings_are_named(recipe: Path) -> None:
    recipe.write_text("output_dir: out\n")
    with pytest.raises(UserError, match="train_file is missing"):
        parse(recipe)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/**/*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_parses(path: Path) -> None:
    kind = GRPORecipe if "rewards" in read_recipe(path) else SFTRecipe
    (config, model), _ = parse_recipe([kind, ModelConfig], ["--config", str(path)])
    assert config.train_file
    assert model.model_name_or_path


GRPO = [GRPORecipe, ModelConfig]


def test_grpo_has_the_keys_of_the_run_and_those_of_the_trainer(recipe: Path) -> None:
    recipe.write_text(
        GOOD + "rewards:\n  - accuracy\n  - {name: format, weight: 0.1}\n"
        "engine: vllm\nengine_options: {max_model_len: 64, engine_args: {seed: 1}}\nnum_generations: 2\n"
    )
    (config, _), given = parse_recipe(GRPO, ["--config", str(recipe), "--latent_k", "6"])
    assert [spec.weight for spec in load_rewards(config.rewards)] == [1.0, 0.1]
    assert (config.latent_k, config.latent_format, config.num_generations) == (6, "lvr", 2)
    assert config.engine_options == {"max_model_len": 64, "engine_args": {"seed": 1}}
    assert config.gradient_checkpointing is False
    assert given["engine"] == "vllm"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "rewards is empty"),
        ("rewards: [accuracy]\nengine: vlm\n", "engine is 'vlm'; did you mean 'vllm'"),
        ("rewards: [accuracy]\nengine_options: 3\n", "engine_options is '3'"),
        ("rewards: [accuracy]\nreward: 1\n", "did you mean 'rewards'"),
        ("rewards: [accuracy]\nnum_generations: 3\n", r"generation_batch_size \(8\) must be divisible by num_gen"),
        ("rewards: [accuracy]\nlatent_policy: gaussian\n", "needs latent_sigma above 0"),
        ("rewards: [accuracy]\nlatent_eval_steps: 5\n", "eval_file is missing"),
        ("rewards: [accuracy]\nown_latents: 0.5\n", "unknown key 'own_latents'"),
    ],
)
def test_mistakes_in_a_recipe_of_grpo(recipe: Path, lines: str, words: str) -> None:
    recipe.write_text(GOOD + lines)
    with pytest.raises(UserError, match=words):
        parse_recipe(GRPO, ["--config", str(recipe)])


def test_the_recipe_is_split_from_its_flags() -> None:
    assert split_config(["--config=a.yaml", "--x", "1"]) == ("a.yaml", ["--x", "1"])
    assert split_config(["--x", "1"]) == (None, ["--x", "1"])


def test_a_reward_file_lies_here_or_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
        (folder / f"{folder.name}.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(here)
    load_rewards(["here.py:one"], beside)
    (spec,) = load_rewards(["beside.py:one"], beside)
    assert spec.function(completions=["a"]) == [1.0]
    with pytest.raises(UserError, match=r"there is no file beside\.py\."):
        load_rewards(["beside.py:one"])
    with pytest.raises(UserError, match=r"no file nowhere\.py, nor .*beside/nowhere\.py"):
        load_rewards(["nowhere.py:one"], beside)


REPEATS = {
    "top": (GOOD + "latent_k: 2\nseed: 1\nlatent_k: 3\n", "'latent_k' stands twice, in lines 6 and 8"),
    "written with a dash": (GOOD + "latent_k: 2\nlatent-k: 2\n", "'latent-k' stands twice, in lines 6 and 7"),
    "nested": (GOOD + "lr_scheduler_kwargs:\n  a: 1\n  b: 2\n  a: 1\n", "'a' stands twice, in lines 7 and 9"),
    "in a list": (GOOD + "rewards:\n  - name: x\n    a: 1\n    a: 2\n", "'a' stands twice, in lines 8 and 9"),
    "in one line": (GOOD + "lr_scheduler_kwargs: {a: 1, a: 2}\n", "'a' stands twice, in lines 6 and 6"),
}


@pytest.mark.parametrize("case", REPEATS)
def test_a_repeated_key_is_refused_with_its_lines(recipe: Path, case: str) -> None:
    text, words = REPEATS[case]
    recipe.write_text(text)
    with pytest.raises(UserError, match=words):
        read_recipe(recipe)


def test_merged_keys_may_be_overridden(recipe: Path) -> None:
    recipe.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, a: 3}\nmore: *base\n")
    assert read_recipe(recipe)["other"] == {"a": 3, "b": 2}


def test_a_repeated_key_in_json_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lr_scheduler_kwargs: 'a' stands twice in one object"):
        parse(recipe, "--lr_scheduler_kwargs", '{"a": 1, "a": 2}')
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 2,\n\t"stage": 3}}')
    with pytest.raises(UserError, match=r"deepspeed .*ds\.json: 'stage' stands twice"):
        parse(recipe, "--deepspeed", str(config))


def test_a_repeated_key_of_an_accelerate_config_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("num_processes: 2\nmixed_precision: 'no'\nnum_processes: 4\n")
    with pytest.raises(UserError, match="'num_processes' stands twice, in lines 1 and 3"):
        launch_words("sft", ["--accelerate_config", str(file)])
    file.write_text("num_processes: 2\nmixed_precision: 'no'\n")
    assert launch_words("sft", ["--accelerate_config", str(file)]) is not None  # control


@pytest.mark.parametrize(
    ("kind", "name", "near", "right"),
    [
        (LatentGRPOConfig, "loss_type", "dr_gpro", "dr_grpo"),
        (LatentGRPOConfig, "importance_sampling_level", "tokens", "token"),
        (LatentGRPOConfig, "scale_rewards", "groups", "group"),
        (LatentGRPOConfig, "multi_objective_aggregation", "normalise_then_sum", "normalize_then_sum"),
        (LatentGRPOConfig, "vllm_importance_sampling_mode", "token_truncated", "token_truncate"),
        (LatentGRPOConfig, "vllm_mode", "colocated", "colocate"),
        (LatentSFTConfig, "loss_type", "nnl", "nll"),
        (LatentSFTConfig, "log_level", "warn", "warning"),
        (LatentSFTConfig, "torch_compile_mode", "reduce_overhead", "reduce-overhead"),
    ],
)
def test_a_word_that_trl_would_trip_over_later_is_refused(tmp_path: Path, kind: type, name: str, near: str, right: str):
    with pytest.raises(UserError, match=rf"{name} is '{near}'; did you mean '{right}'\?"):
        kind(output_dir=str(tmp_path), use_cpu=True, **{name: near})
    kind(output_dir=str(tmp_path), use_cpu=True, **({} if name == "torch_compile_mode" else {name: right}))  # control


def test_trl_knows_these_words_and_no_others() -> None:
    source = inspect.getsource(GRPOTrainer)
    for name, words in TRL_CHOICES.items():
        for word in words:
            assert isinstance(word, bool) or name == "vllm_mode" or f'"{word}"' in source, word
    compared = re.findall(r'self\.loss_type (?:==|in|!=) (\[[^\]]*\]|"\w+")', source)
    assert {word for text in compared for word in re.findall(r'"(\w+)"', text)} == set(TRL_CHOICES["loss_type"])
