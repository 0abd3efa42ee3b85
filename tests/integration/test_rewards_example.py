"""The example of docs/rewards.md does what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from lab_tools import grpo, logged

from rl_lvr.cli import main
from rl_lvr.rollout.record import read_rollouts, reward_columns
from rl_lvr.training.rewards.load import KEYS, load_rewards, signals_of, weights_at

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


JUDGE = blocks("yaml")[2].replace("key_file: judge.key, ", "")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's file in it, and rollouts written by hand."""
    (tmp_path / "my_rewards.py").write_text(blocks("python")[0])
    (tmp_path / "mine.jsonl").write_text(
        '{"prompt": "q", "completion": "red", "answer": "red", "signals": {"attention_mass": 0.25}}\n'
        '{"prompt": "q", "completion": "well, it could be red", "answer": "red", "signals": {"attention_mass": 0.5}}\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_is_fifteen_lines() -> None:
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 15


def test_the_example_runs(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"^    rl-lvr (rewards test .*)$", PAGE, re.MULTILINE)
    assert main(command.replace("runs/my-run", "mine.jsonl").split()) == 0
    assert "short: mean 0.5000 of 2" in capsys.readouterr().out
    assert main(["rewards", "test", "my_rewards.py:looks", "--data", "mine.jsonl"]) == 0
    assert "looks: mean 0.3750 of 2" in capsys.readouterr().out


def test_the_recipes_on_the_page_load(example: Path) -> None:
    first, paper_b, judge = (load_rewards(yaml.safe_load(text)["rewards"]) for text in [*blocks("yaml")[:2], JUDGE])
    assert [spec.name for spec in first] == ["accuracy", "short", "looks"]
    assert weights_at(first, 0) == [1, 0.1, 1]
    assert weights_at(first, 200) == [1, 0.1, 0.5]
    assert signals_of(first) == ["attention_mass"]
    assert [spec.weight for spec in paper_b] == [0.9, 0.1, 1, 1]
    assert judge[0].name == "judge"
    assert [spec.name for spec in paper_b][1:] == ["paper_b_format", "paper_b_length", "paper_b_attention"]
    columns = {"completions": ["red", "x" * 30 + "red"], "answer": ["red", "red"]}
    assert first[1].function(**columns) == [1, 0]


def test_the_file_of_the_page_trains(example: Path, opener: Path, place: Path) -> None:
    """Word for word, through the command line, and with text that is there to be found."""
    named = ["my_rewards.py:short", "my_rewards.py:looks"]
    settings = {"per_device_train_batch_size": 16, "max_steps": 1}
    assert grpo(opener, place / "data", example / "run", rewards=named, **settings) == 0
    (row,) = logged(example / "run")
    assert row["rewards/short/mean"] > 0
    assert row["rewards/looks/mean"] > 0
    assert row["reward"] > 0
    texts = reward_columns(list(read_rollouts(example / "run")))["texts"]
    assert all(isinstance(text, str) and "<|" not in text for text in texts)


def test_the_class_of_the_page_remembers(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example / "rare.py").write_text(blocks("python")[1])
    lines = ((0, "red"), (0, "red"), (1, "red"), (1, "blue"))
    rows = (f'{{"prompt": "q", "completion": "{text}", "step": {step}}}' for step, text in lines)
    (example / "steps.jsonl").write_text("\n".join(rows))
    assert main(["rewards", "test", "rare.py:Rare", "--data", "steps.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == [1, 1, 0, 1]


def test_the_page_names_every_reward_and_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "list"]) == 0
    listed = re.findall(r"^(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) >= 10
    for name in (*listed, *KEYS):
        assert f"| `{name}` |" in PAGE
