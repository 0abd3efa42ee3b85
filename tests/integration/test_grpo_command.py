"""`rl-lvr grpo` as a user meets it: a recipe, what it leaves, how it goes on, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab_tools import grpo, logged, puzzles, same, weights

from rl_lvr import cli
from rl_lvr.data.writing import write_parquet
from rl_lvr.latents.format import LatentFormat
from rl_lvr.models import load_model
from rl_lvr.rollout.record import read_rollouts

REWARD = """
def letters(completions, id, answer, hops, **_):
    assert all(id) and all(answer) and all(hops)
    return [float(sum(map(ord, str(text))) % 7) for text in completions]
"""


@pytest.fixture(scope="module")
def home(opener: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a reward beside it, and `run`, which it left; its checkpoint is of step 1 of 2."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine.py").write_text(REWARD)
    recipe = {
        "model_name_or_path": str(opener),
        "train_file": str(place / "data" / "train.parquet"),
        "eval_file": str(place / "data" / "test.parquet"),
        "latent_format": "lvr",
        "latent_k": 3,
        "rewards": ["accuracy", {"name": "mine.py:letters", "label": "mine", "weight": 0.5}],
        "max_steps": 2,
        "save_steps": 1,
        "save_total_limit": 2,
        "latent_eval_steps": 2,
        "latent_eval_samples": 4,
        "latent_eval_max_tokens": 8,
        "latent_eval_conditions": ["own", "noise"],
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 14,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "threads": 1,
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli.main(["grpo", "--config", str(home / "recipe.yaml"), "--output_dir", str(home / "run")]) == 0
    return home


def test_what_a_run_leaves(home: Path, opener: Path) -> None:
    run = home / "run"
    rows = logged(run)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        parts = row["rewards/accuracy/mean"] + 0.5 * row["rewards/mine/mean"]
        assert row["reward"] == pytest.approx(parts, abs=1e-4)
        assert row["latent/replay_logp_diff"] < 1e-3
    assert rows[1]["latent/rate"] > 0
    assert 0 <= rows[1]["latent/accuracy_own"] <= 1
    assert "latent/accuracy_noise" in rows[1]

    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert start["verb"] == "grpo"
    assert start["given"]["rewards"][1]["label"] == "mine"
    assert start["resolved"]["training"]["latent_policy"] == "context"

    assert LatentFormat.load(run).k == 3
    assert LatentFormat.load(run / "checkpoint-1").k == 3
    load_model(run)
    moved = weights(run)["lm_head.weight"] - weights(opener)["lm_head.weight"]
    assert moved.abs().max() > 0
    frozen = [name for name in weights(run) if "visual" in name]
    assert frozen
    assert all((weights(run)[name] == weights(opener)[name]).all() for name in frozen)

    recorded = read_rollouts(run)
    assert len(recorded) == 16
    assert {rollout.answer is not None for rollout in recorded} == {True}
    assert all("hops" in rollout.columns for rollout in recorded)


def test_a_run_goes_on_where_it_stopped(home: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(home / "run", again)
    shutil.rmtree(again / "checkpoint-2")
    shutil.rmtree(again / "rollouts")
    (again / "model.safetensors").unlink()
    words = ["grpo", "--config", str(home / "recipe.yaml"), "--output_dir", str(again)]
    assert cli.main(words) == 2  # an earlier run is never overwritten
    assert cli.main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert same(again, home / "run")
    assert [row["step"] for row in logged(again)] == [1, 2]


def test_an_adapter_is_merged(home: Path, opener: Path, place: Path, tmp_path: Path) -> None:
    settings = {"use_peft": True, "rewards": f"{home / 'mine.py'}:letters"}
    settings["latent_policy"] = "unrolled"  # which TRL's own default of lora_dropout would not allow
    assert grpo(opener, place / "data", tmp_path / "out", max_steps=1, **settings) == 0
    load_model(tmp_path / "out" / "merged")
    merged, start = weights(tmp_path / "out" / "merged"), weights(opener)
    assert merged.keys() == start.keys()
    assert any((merged[name] != start[name]).any() for name in merged)
    for folder in ("out", "out/merged"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "base_model: model" in text
        assert "trained on `data/train.parquet` with TRL's GRPO on latents" in text
        assert "None" not in text
        assert str(opener) not in text


def test_held_out_rewards_are_logged(home: Path, opener: Path, place: Path, tmp_path: Path) -> None:
    write_parquet(puzzles(2), tmp_path / "eval.parquet")
    settings = {"rewards": f"{home / 'mine.py'}:letters", "eval_strategy": "steps", "eval_steps": 1}
    out, held = tmp_path / "out", tmp_path / "eval.parquet"
    assert grpo(opener, place / "data", out, max_steps=1, train_limit=2, eval_file=held, **settings) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_reward"] >= 0 for row in rows if "eval_reward" in row] == [True]


def test_without_a_format_it_trains_the_twin(home: Path, opener: Path, place: Path, tmp_path: Path) -> None:
    settings = {"rewards": f"{home / 'mine.py'}:letters", "latent_format": "none", "latent_k": None}
    assert grpo(opener, place / "data", tmp_path / "out", max_steps=1, **settings) == 0
    (row,) = logged(tmp_path / "out")
    assert "latent/rate" not in row
    assert LatentFormat.load(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards": "acuracy"}, "no reward 'acuracy'; did you mean 'accuracy'"),
        ({"rewards": "nowhere.py:mine"}, "there is no file nowhere.py"),
        ({"latent_policy": "gaussian"}, "needs latent_sigma above 0"),
        ({"num_generations": 3}, "divisible by num_generations"),
        ({"engine": "vllm", "engine_options": '{"max_modellen": 9}'}, "did you mean 'max_model_len'"),
        ({"engine": "server"}, "keeps the weights that it was started with"),
        ({"latent_format": "none", "latent_k": None, "engine": "vllm"}, "leave engine and its options out"),
        ({"latent_format": "none", "latent_k": None, "rewards": "attention"}, "needs a latent format"),
        ({"latent_format": "none", "latent_k": None, "latent_sigma": 0.1}, "latent_sigma cannot be used without"),
        ({"latent_format": "none", "latent_k": None, "latent_start": "forced"}, "latent_start cannot be used without"),
        ({"latent_format": "monet"}, "set add_marker_tokens to true"),
        ({"reward_weights": "1.0"}, "reward_weights has no effect here"),
        ({"use_vllm": True}, "use_vllm cannot be used with a latent format"),
        ({"use_peft": True, "freeze_merger": False}, "vision parts frozen"),
        ({"use_peft": True, "lora_dropout": 0.05, "latent_policy": "unrolled"}, "set lora_dropout to 0"),
        ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"resume_from_checkpoint": "latest"}, "nothing to resume"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    opener: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: dict[str, Any], words: str
) -> None:
    out = tmp_path / "out"
    assert grpo(opener, place / "data", out, **{"rewards": "accuracy", **settings}) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rl-lvr: ")
    assert words in last
    assert not out.exists()


def test_a_record_without_what_a_reward_needs_is_named(
    opener: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = puzzles(4)
    write_parquet([*records[:3], replace(records[3], answer=None)], tmp_path / "train.parquet")
    assert grpo(opener, tmp_path, tmp_path / "out", rewards="accuracy") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"(id {records[3].id!r}): answer: is missing, and reward 'accuracy' needs it" in last
