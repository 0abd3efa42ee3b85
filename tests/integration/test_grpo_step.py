"""Inside a step: rollouts without latents for `necessity`, chunks of the scoring pass, phases, and the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from grpo_cases import LVR, generation, logged, make_trainer, opening, rows

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.spans import find_spans
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.record import read_rollouts, reward_columns
from rl_lvr.rollout.types import Capability


def test_necessity_rolls_out_again_without_latents(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    asked: list[int] = []

    class Counted(HFRolloutEngine):
        def generate(self, requests: Any, sampling: Any) -> Any:
            asked.append(len(requests))
            return super().generate(requests, sampling)

    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        reward_names=("letters", "needed"),
        engine=Counted(model, processor, LVR),
        parity_check=False,
        max_completion_length=20,
        per_device_train_batch_size=8,
    )
    trainer.train()
    found = read_rollouts(tmp_path / "run")
    with_span = [rollout for rollout in found if rollout.spans]
    assert asked == [8, len(with_span)]
    assert with_span
    changed = 0
    for rollout in found:
        without = rollout.columns["necessity_completions"]
        assert (without is None) == (not rollout.spans)
        if without is None:
            continue
        # Draws are keyed: the same text up to the first span, and another after it for some.
        before = processor.tokenizer.decode(
            rollout.completion_ids[: rollout.spans[0]["begin"]], skip_special_tokens=True
        )
        assert without.startswith(before)
        changed += without != rollout.completion[0]["content"]
        assert rollout.rewards["needed"] == float(len(without))
    assert changed
    assert reward_columns(found)["necessity_completions"] == [r.columns["necessity_completions"] for r in found]


def test_without_latents_there_is_no_slot(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, reward_names=("needed",), max_completion_length=20)
    turns: list[Any] = []
    honest = trainer.run.generator.completed
    trainer.run.generator.completed = lambda *asked: turns.append(honest(*asked)) or turns[-1]
    generation(trainer)
    first, again = turns[0], turns[-1]
    assert any(rollout.latent_positions for rollout in first)
    for rollout in again:
        assert not rollout.latent_positions
        spans = find_spans(rollout.ids, trainer.markers).spans
        assert spans
        assert all(span.slots == 0 for span in spans)


def test_no_span_no_second_rollout(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    asked: list[int] = []

    class Plain(HFRolloutEngine):
        def generate(self, requests: Any, sampling: Any) -> Any:
            asked.append(len(requests))
            return super().generate([replace(r, intervention=Intervention.NONE) for r in requests], sampling)

    engine = Plain(model, processor, LVR)
    more = {"parity_check": False, "replay_tolerance": 1e9}  # an engine that never opens a span is another policy
    trainer = make_trainer(model, processor, tmp_path, reward_names=("needed",), engine=engine, **more)
    trainer.train()
    assert asked == [4]
    found = read_rollouts(tmp_path / "run")
    assert {r.columns["necessity_completions"] for r in found} == {None}
    assert {r.rewards["needed"] for r in found} == {0.0}


def test_an_engine_that_cannot_leave_latents_out_is_refused(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    engine = HFRolloutEngine(model, processor, LVR)
    engine.capabilities -= {Capability.INTERVENTIONS}
    with pytest.raises(UserError, match="cannot leave latents out"):
        make_trainer(model, processor, tmp_path, reward_names=("needed",), engine=engine)
    make_trainer(model, processor, tmp_path, engine=engine)  # nobody asks for it


def test_scoring_batch_changes_the_chunks_alone(load_tiny: Any, tmp_path: Path) -> None:
    found = []
    for size in (None, 1, 3):
        model, processor = opening(load_tiny)
        trainer = make_trainer(
            model, processor, tmp_path, scoring_batch=size, reward_names=("looks",), parity_check=False
        )
        chunks: list[int] = []
        # Prefills carry a cache, scoring passes do not.
        handle = model.model.register_forward_hook(
            lambda *parts, to=chunks: (
                to.append(len(parts[2].last_hidden_state)) if parts[2].past_key_values is None else None
            )
        )
        made = generation(trainer)
        handle.remove()
        found.append((made["old_per_token_logps"], made["advantages"]))
        if size:
            assert chunks == [size] * (4 // size) + [4 % size] * (4 % size > 0)
    for old, advantages in found[1:]:
        assert torch.allclose(old, found[0][0], atol=1e-5)
        assert torch.allclose(advantages, found[0][1], atol=1e-3)


def test_phases_add_up_to_the_step(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, max_steps=2, gradient_accumulation_steps=2, num_iterations=2)
    trainer.train()
    seconds = {
        name: logged(trainer, f"phase/{name}_seconds") for name in ("generate", "score", "reward", "loss", "optimizer")
    }
    assert all(len(values) == 2 for values in seconds.values())
    assert all(values[0] > 0 for values in seconds.values()), seconds
    assert seconds["generate"][1] == seconds["score"][1] == 0  # the second step uses the rollouts of the first
    assert seconds["loss"][1] > 0
    inside = sum(map(sum, seconds.values()))
    assert 0.5 * sum(logged(trainer, "step_time")) < inside <= logged(trainer, "train_runtime")[0]
    if Path("/proc/self/clear_refs").exists():
        assert logged(trainer, "phase/loss_peak_mib")[0] > 100
    assert not logged(trainer, "phase/loss_mfu")  # of GPUs alone


def test_padding_is_no_work(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path)
    trainer.timing.peak_flops = 1e12
    mask = torch.ones(2, 10, dtype=torch.long)
    trainer.timing.note_work("score", mask[:, :7], 3)
    trainer.timing.note_work("generate", torch.cat([mask[:, :7], 0 * mask[:, 7:]], 1), 6)  # three columns of padding
    assert trainer.timing.phases._flops["score"] == trainer.timing.phases._flops["generate"] > 0
    trainer.timing.note_work("loss", mask, 6)
    assert trainer.timing.phases._flops["loss"] > 3 * trainer.timing.phases._flops["score"]


def test_the_table_shows_latents_and_signals(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, reward_names=("letters", "looks"), log_completions=True)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    found = read_rollouts(tmp_path / "run")
    assert len(table) == len(found) == len(rows())
    assert table["signal/attention_mass"].tolist() == [r.signals["attention_mass"] for r in found]
    assert table["latents"].tolist() == [sum(span["latents"] for span in r.spans) for r in found]
    assert table["looks"].tolist() == pytest.approx([r.rewards["looks"] for r in found])
