"""Loaded rewards in TRL's own trainer, and on what the real engine generates and the real probe measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import FORMATS, SAMPLED, Rig

from rl_lvr.cli import main
from rl_lvr.latents.format import get_format
from rl_lvr.latents.spans import SpanStatus, find_spans
from rl_lvr.rollout.record import RolloutLog, read_rollouts, recorded, reward_columns, span_facts
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.rollout.types import latent_batch
from rl_lvr.signals import measure, parse_signals
from rl_lvr.training.rewards.call import RewardError
from rl_lvr.training.rewards.load import load_rewards, signals_of, weights_at

OWN = """
async def letters(completions, trainer_state, log_extra, **_):
    log_extra("letters", [len(c) for c in completions])
    return [float(len(c)) for c in completions]

def flaky(completions, **_):
    return [float("nan"), *(1.0 for _ in completions[1:])]
"""


@pytest.fixture(scope="module")
def rig(load_tiny) -> Rig:
    return Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))


def trainer_with(rig: Rig, specs: list[Any], folder: Path) -> Any:
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(rig.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    rows = [{"prompt": f"what is next {n}", "answer": "red", "solution": "$3$", "kind": "a column"} for n in range(4)]
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        reward_weights=weights_at(specs, 0),
    )
    return GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=[spec.function for spec in specs],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=rig.tokenizer,
    )


def test_trl_takes_them_as_they_are(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    entries = [
        {"name": "accuracy", "weight": 0.5},
        "repetition",
        f"{tmp_path}/own.py:letters",
        {"name": f"{tmp_path}/own.py:flaky", "on_error": "exclude"},
    ]
    trainer = trainer_with(rig, load_rewards(entries), tmp_path / "run")
    assert trainer.reward_func_names == ["accuracy", "repetition", "letters", "flaky"]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/letters/mean"] > 0
    assert logged["rewards/accuracy/mean"] == 0  # untrained; the data's column `kind` did not reach its option
    assert 0 <= logged["rewards/accuracy/unreadable"] <= 1
    assert logged["rewards/flaky/mean"] == 1
    assert logged["rewards/flaky/excluded"] == 1
    assert "rewards/letters/excluded" not in logged


def test_a_fault_stops_training_with_one_clear_error(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(RewardError, match="reward 'flaky' returned nan on sample 0 of the batch"):
        trainer_with(rig, load_rewards([f"{tmp_path}/own.py:flaky"]), tmp_path / "run").train()


def test_a_reward_of_trl_itself(rig: Rig) -> None:
    (spec,) = load_rewards(["trl.rewards.accuracy_rewards:accuracy_reward"])
    messages = [[{"role": "assistant", "content": text}] for text in (r"\boxed{3}", r"\boxed{4}")]
    assert spec.function(completions=messages, solution=["$3$", "$3$"]) == [1, 0]


@pytest.mark.parametrize("name", ["lvr", "monet"])
def test_rollouts_of_the_engine_are_recorded_scored_and_shown(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    format_ = get_format(name, k=3, length="fixed")
    with rig.thinking(format_):
        engine = rig.engine(format_)
        requests = rig.requests()
        rollouts = engine.generate(requests, SAMPLED)
    specs = load_rewards(["format", "presence", "paper_b_attention", "attention", "confidence_text", "confidence_code"])
    wanted = parse_signals(signals_of(specs))
    batch = replay_batch(rig.model, rollouts, [request.images for request in requests])
    columns = measure(rig.model, batch, engine.markers, wanted).columns
    paper_b = columns["attention_mass_paper_b"].values
    records = [
        recorded(
            rollout,
            rig.tokenizer,
            engine.markers,
            answer="red",
            group=number // 2,
            signals={name: column.values[number] for name, column in columns.items()},
        )
        for number, rollout in enumerate(rollouts)
    ]
    RolloutLog(tmp_path / "rollouts").append(0, records, latent_batch(rollouts))

    found = read_rollouts(tmp_path)
    given = reward_columns(list(found))
    scores = {spec.name: spec.function(**given) for spec in specs}
    assert scores["paper_b_attention"] == paper_b
    # Ours is 0 where no text follows the last span, and theirs looks from the whole completion then.
    assert all(ours in (0.0, pytest.approx(theirs)) for ours, theirs in zip(scores["attention"], paper_b, strict=True))
    assert max(scores["attention"]) > 0
    assert max(paper_b) > 0
    assert scores["confidence_code"] == columns["confidence_reward"].values
    for number, rollout in enumerate(rollouts):
        values, positions = found.latents(number).row(0)
        assert torch.equal(values, rollout.latents)
        assert tuple(positions.tolist()) == rollout.latent_positions
        spans = find_spans(rollout.completion_ids, engine.markers)
        closed = [span for span in spans.spans if span.status is SpanStatus.CLOSED]
        assert (scores["presence"][number] > 0) == bool(closed)
        if spans.stray or len(closed) < len(spans.spans):
            assert scores["format"][number] == 0
    assert sum(fact["latents"] for r in rollouts for fact in span_facts(r, engine.markers)) == sum(
        len(r.latent_positions) for r in rollouts
    )

    assert main(["rollouts", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "⟦3 latents⟧" in shown
    assert "3 latents, closed" in shown
    assert main(["rewards", "test", "paper_b_attention", "--data", str(tmp_path)]) == 0
    assert f"mean {sum(paper_b) / len(paper_b):.4f} of {len(paper_b)} scored" in capsys.readouterr().out


def test_span_facts_count_from_the_completion(rig: Rig) -> None:
    from dataclasses import replace

    engine = rig.engine(get_format("lvr", k=3))
    with rig.thinking(engine.format):
        (rollout, *_) = engine.generate(rig.requests()[1:2], SAMPLED)
    markers = engine.markers
    word = rig.tokenizer.encode("red", add_special_tokens=False)[0]
    span = [markers.start, *[markers.slot] * 3, markers.end]
    first = len(rollout.prompt_ids)
    tokens = [word, *span, markers.end, markers.start, word, markers.start, markers.slot]
    made = replace(rollout, completion_ids=tuple(tokens), latent_positions=tuple(first + p for p in (2, 3, 4)))
    facts = [(f["begin"], f["stop"], f["latents"], f["status"]) for f in span_facts(made, markers)]
    assert facts == [(1, 6, 3, "closed"), (6, 7, 0, "stray"), (7, 8, 0, "broken"), (9, 11, 0, "truncated")]
    at = [fact["at"] for fact in span_facts(made, markers, rig.tokenizer)]
    assert at == [len("red")] * 3 + [len("redred")]  # characters of the text before each
    in_prompt = replace(made, prompt_ids=(*rollout.prompt_ids, *span), completion_ids=(word,), latent_positions=())
    assert span_facts(in_prompt, markers) == []
