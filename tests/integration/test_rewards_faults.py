"""Rewards that hang, or return NaN or the wrong number of values, in a run of GRPO with latents."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, logged, opening, rows, settings

from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.rewards.call import RewardError
from rl_lvr.training.rewards.load import load_rewards
from rl_lvr.training.runs.checkpoints import defect

OWN = """
import asyncio
import time

def letters(completions):
    return [float(sum(map(ord, str(c))) % 7) for c in completions]

def hangs(completions, trainer_state):
    if trainer_state.global_step == 1:
        time.sleep(600)
    return [1.0] * len(completions)

async def waits(completions, trainer_state):
    if trainer_state.global_step == 1:
        await asyncio.sleep(600)
    return [1.0] * len(completions)

def nan(completions, trainer_state):
    values = [1.0] * len(completions)
    if trainer_state.global_step == 1:
        values[1] = float("nan")
    return values

def short(completions, trainer_state):
    return [1.0] * (len(completions) - (trainer_state.global_step == 1))
"""
FAULTS = {
    "hangs": "did not end within 2 s",
    "waits": "did not end within 2 s",
    "nan": "returned nan on sample 1 of the batch",
    "short": "returned 3 values for 4 completions",
}


def trainer_with(load_tiny: Any, folder: Path, faulty: dict[str, Any]) -> LatentGRPOTrainer:
    path = folder / "own.py"
    path.write_text(OWN)
    model, processor = opening(load_tiny)
    entries = [f"{path}:letters", {**faulty, "name": f"{path}:{faulty['name']}"}]
    return LatentGRPOTrainer(
        model,
        load_rewards(entries),
        LatentGRPOConfig(**settings(folder, max_steps=3, parity_check=False)),
        latent_format=LVR,
        train_dataset=rows(images=False),
        processing_class=processor,
    )


@pytest.mark.parametrize("name", FAULTS)
def test_it_stops_the_run_with_a_checkpoint(load_tiny: Any, tmp_path: Path, name: str) -> None:
    trainer = trainer_with(load_tiny, tmp_path, {"name": name, "timeout": 2})
    with pytest.raises(RewardError, match=f"reward '{name}' {FAULTS[name]}: fix it"):
        trainer.train()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-1"
    assert defect(checkpoint) is None


@pytest.mark.parametrize("name", FAULTS)
def test_or_is_left_out_and_counted(load_tiny: Any, tmp_path: Path, name: str) -> None:
    trainer = trainer_with(load_tiny, tmp_path, {"name": name, "timeout": 2, "on_error": "exclude"})
    began = time.perf_counter()
    trainer.train()
    assert time.perf_counter() - began < 300  # and not the 600 that it would sleep
    assert trainer.state.global_step == 3
    lost = 1 if name == "nan" else 4
    assert logged(trainer, f"rewards/{name}/excluded") == [0, lost, 0]
    means = logged(trainer, f"rewards/{name}/mean")
    assert (means[0], means[2]) == (1, 1)
    assert means[1] == (1 if name == "nan" else None)
    # What is left of the sum: the other reward of every sample, and this one where it was scored.
    others = logged(trainer, "rewards/letters/mean")
    assert logged(trainer, "reward") == pytest.approx([others[0] + 1, others[1] + (4 - lost) / 4, others[2] + 1])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert not list((tmp_path / "run").glob("checkpoint-*"))  # control: nothing stopped it
