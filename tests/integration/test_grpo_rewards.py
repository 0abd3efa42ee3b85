"""What rewards are given in a run, what one of them can do to the others, and one that is constant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpo_cases
import pytest
import torch
from grpo_cases import LVR, make_trainer, opening, rows
from lab_tools import same

from rl_lvr.errors import UserError
from rl_lvr.rollout.record import read_rollouts, reward_columns
from rl_lvr.signals import between_samples, pooled
from rl_lvr.training.rewards.load import load_rewards

OWN = """
def letters(completions, texts, spans, **_):
    assert [row[0]["content"] for row in completions] == texts
    assert all(isinstance(found, list) for found in spans)
    return [float(sum(map(ord, text)) % 7) for text in texts]

def spoils(prompts, completions, completion_ids, texts, spans, answer, **columns):
    for column in (prompts, completions, completion_ids, spans):
        for row in column:
            row and isinstance(row[0], dict) and row[0].clear()
            row.clear()
    for column in (texts, answer, *(value for value in columns.values() if isinstance(value, list))):
        column.clear()
    return [0.0] * len(prompts)

async def spoils_later(prompts, **columns):
    return spoils(prompts, **columns)

class Alone:
    def __call__(self, completions, **_):
        return [1.0] * len(completions)

    def state_dict(self):
        return {"what": {1, 2}}

    def load_state_dict(self, state):
        pass

def without_latents(texts, completions, **_):
    assert [row[0]["content"] for row in completions] == texts
    return [float(len(text)) for text in texts]
"""


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo_cases, "REWARDS", OWN)


def train(load_tiny: Any, folder: Path, *names: str, latents: bool = True) -> Any:
    folder.mkdir()
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, folder, LVR if latents else None, reward_names=names, max_steps=3)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return trainer


def test_a_reward_that_spoils_what_it_is_given_spoils_nothing(
    load_tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the rewards behind it, nor the record, nor the training; and it is constant, which is said."""
    train(load_tiny, tmp_path / "plain", "letters")
    with caplog.at_level(logging.WARNING):
        train(load_tiny, tmp_path / "spoiled", "spoils", "spoils_later", "letters")
    assert same(tmp_path / "plain" / "model", tmp_path / "spoiled" / "model")
    plain, spoiled = (read_rollouts(tmp_path / name / "run") for name in ("plain", "spoiled"))
    assert [r.rewards["letters"] for r in plain] == [r.rewards["letters"] for r in spoiled]
    assert [(r.prompt, r.completion, r.completion_ids, r.spans) for r in plain] == [
        (r.prompt, r.completion, r.completion_ids, r.spans) for r in spoiled
    ]
    named = [message for message in caplog.messages if "to each of the 12 completions" in message]
    assert [message.split("'")[1] for message in named] == ["spoils", "spoils_later"]
    assert "completions = [{'role': 'assistant', 'content': '" in named[0]


def test_texts_are_there_without_latents(load_tiny: Any, tmp_path: Path) -> None:
    trainer = train(load_tiny, tmp_path / "run", "without_latents", latents=False)
    assert trainer.state.log_history[0]["rewards/without_latents/mean"] > 0


def test_a_state_that_cannot_be_written_is_refused(load_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward 'Alone': state_dict\(\) returned what JSON cannot hold"):
        train(load_tiny, tmp_path / "run", "Alone")


PAPER_B = [f"paper_b_{name}" for name in ("attention", "presence", "length", "necessity", "format")]


def test_rewards_of_paper_b_and_the_collapse_of_a_run(
    load_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run recorded gives the same once more, but for the reward with state; and its latents give the metric."""
    made = load_rewards([*PAPER_B, {"name": "paper_b_attention", "label": "r", "options": {"relative": True}}])
    monkeypatch.setattr(grpo_cases, "rewards", lambda folder, *names: made)
    ids = [f"question {number}" for number in range(4)]
    model, processor = opening(load_tiny)
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        data=rows().add_column("id", ids),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        parity_check=False,
    )
    trainer.train()
    found = read_rollouts(tmp_path / "run")
    assert len(found) == 16
    given = reward_columns(list(found))
    for spec in made:
        if spec.name != "paper_b_length":
            assert spec.function(**given) == pytest.approx([r.rewards[spec.name] for r in found]), spec.name
    for row in found:
        closed = any(span["status"] == "closed" for span in row.spans)
        assert row.rewards["paper_b_presence"] == 0.5 * ("start" in row.columns["markers"])
        assert (row.columns["necessity_continuations"] is not None) == closed
        if closed:
            assert row.columns["necessity_completions"].endswith(row.columns["necessity_continuations"])
    assert any(row.rewards["paper_b_attention"] > 0 for row in found)

    for step, logged in enumerate(trainer.state.log_history[:2]):
        numbers = [number for number in range(16) if found[number].step == step]
        values = [found.latents(number).values[0] for number in numbers]
        expected = between_samples(
            torch.stack([pooled(row[row.abs().sum(-1) > 0]) for row in values]), [found[n].group for n in numbers]
        )
        assert expected.pairs
        assert logged["latent/collapse"] == pytest.approx(expected.cosine, abs=1e-4)
