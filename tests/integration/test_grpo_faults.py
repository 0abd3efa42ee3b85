"""Faults in a real run of GRPO: what stops it, what is left out, and that the last whole step is kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, make_trainer, opening, rows, settings
from lab_tools import weights
from torch import Tensor

from rl_lvr.errors import Fault, UserError
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.callbacks import Abandoned, Interrupt
from rl_lvr.training.checkpoints import defect
from rl_lvr.training.faults import RULES
from rl_lvr.training.grpo import LatentGRPOTrainer
from rl_lvr.training.grpo_config import LatentGRPOConfig
from rl_lvr.training.rewarding.guard import RewardError
from rl_lvr.training.rewards import load_rewards

FAULTY = """
calls = 0

def same(completions, **_):
    return [1.0 for _ in completions]

def breaks(completions, **_):
    global calls
    calls += 1
    if calls == 3:
        raise ValueError("the third time")
    return [float(sum(map(ord, str(c))) % 7) for c in completions]
"""


class Elsewhere:
    """An engine that is not the trainer's own, and fails at some of its calls."""

    def __init__(self, engine: HFRolloutEngine, fails_at: tuple[int, ...] = (), loses: bool = False) -> None:
        self.engine, self.fails_at, self.loses, self.calls = engine, fails_at, loses, 0
        self.markers, self.capabilities = engine.markers, engine.capabilities

    def generate(self, requests: Any, sampling: Any) -> Any:
        self.calls += 1
        if self.calls in self.fails_at:
            raise ConnectionError("the engine is gone")
        rollouts = self.engine.generate(requests, sampling)
        return rollouts[:-1] if self.loses else rollouts

    def sync_weights(self, model: Any) -> None:
        self.engine.sync_weights(model)

    def close(self) -> None:
        self.engine.close()


class Spoiled(LatentGRPOTrainer):
    """Its loss or its gradient is no number in the third step."""

    spoils = "loss"

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.state.global_step == 2 and self.spoils == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    def _latent_term(self, *args: Any) -> Tensor:
        term = super()._latent_term(*args)
        return term * torch.nan if self.state.global_step == 2 and self.spoils == "loss" else term


class SpoiledGradient(Spoiled):
    spoils = "gradient"


def run_of(load_tiny: Any, folder: Path, engine: dict[str, Any] | None = None, **changes: Any) -> Any:
    model, processor = opening(load_tiny)
    made = {"max_steps": 4, "parity_check": False, "data": rows(images=False), **changes}
    if engine is not None:
        made["engine"] = Elsewhere(HFRolloutEngine(model, processor, LVR, batch_size=16), **engine)
    folder.mkdir(parents=True, exist_ok=True)
    return make_trainer(model, processor, folder, **made)


def faulty(load_tiny: Any, folder: Path, name: str, **changes: Any) -> Any:
    (folder / "faulty.py").write_text(FAULTY)
    model, processor = opening(load_tiny)
    return LatentGRPOTrainer(
        model,
        LatentGRPOConfig(**settings(folder, max_steps=4, parity_check=False, **changes)),
        latent_format=LVR,
        rewards=load_rewards([f"{folder / 'faulty.py'}:{name}"]),
        train_dataset=rows(images=False),
        processing_class=processor,
    )


def kept(folder: Path) -> list[int]:
    found = sorted((folder / "run").glob("checkpoint-*"))
    assert all(defect(checkpoint) is None for checkpoint in found)
    return [int(checkpoint.name[11:]) for checkpoint in found]


def test_an_engine_that_dies_leaves_the_last_whole_step(load_tiny: Any, tmp_path: Path) -> None:
    trainer = run_of(load_tiny, tmp_path, {"fails_at": (3,)})
    with pytest.raises(Fault, match=r"the engine Elsewhere failed after step 2: ConnectionError: the engine is gone\."):
        trainer.train()
    assert kept(tmp_path) == [2]
    stored = weights(tmp_path / "run" / "checkpoint-2")
    mine = trainer.model.state_dict()["lm_head.weight"]
    assert torch.equal(stored["lm_head.weight"], mine)


def test_an_engine_in_another_process_is_asked_again(load_tiny: Any, tmp_path: Path) -> None:
    trainer = run_of(load_tiny, tmp_path, {"fails_at": (2,)}, engine_retries=1, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.engine.calls == 3
    assert kept(tmp_path) == []  # control: nothing was wrong, and save_strategy is no
    with pytest.raises(UserError, match="the engine hf would fail again"):
        run_of(load_tiny, tmp_path, engine_retries=1)


def test_an_engine_that_loses_a_rollout_is_named(load_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="failed after step 0: it made 3 rollouts of 4 requests"):
        run_of(load_tiny, tmp_path, {"loses": True}).train()
    assert kept(tmp_path) == []  # there was no whole step


def test_rollouts_that_are_left_out_move_nothing(load_tiny: Any, tmp_path: Path) -> None:
    """The limit cuts some spans. Their group's mean and std are those of the others."""
    rules = {"unclosed": "exclude"}
    trainer = run_of(load_tiny, tmp_path, on_rollout=rules, max_completion_length=6, num_generations=8,
                     per_device_train_batch_size=8, latent_policy="gaussian")  # fmt: skip
    made = trainer._generate_and_score_completions([dict(row) for row in rows(images=False, count=1)] * 8)
    out = ~made["tool_mask"].bool().any(1)
    assert 0 < int(out.sum()) < 7
    assert trainer._metrics["train"]["rollouts/excluded_unclosed"] == [int(out.sum()) / 8]
    assert set(made["advantages"][out].tolist()) == {0.0}
    raw = torch.tensor([reward[0] for reward in zip(trainer._logs["rewards"]["letters"], strict=True)])
    assert torch.equal(raw.isnan(), out)
    others = raw[~out]
    expected = (others - others.mean()) / (others.std() + 1e-4)
    assert torch.allclose(made["advantages"][~out], expected, atol=1e-5)

    def gradient(batch: dict[str, Any]) -> Tensor:
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        return trainer.model.get_output_embeddings().weight.grad.clone()

    before = gradient({**made})
    ids = made["completion_ids"].clone()
    last = made["completion_mask"].sum(1) - 1
    for row in range(8):
        if bool(out[row]):
            ids[row, 0] = 5  # other text in what is left out; START stays where it was
    assert int(last.min()) > 0
    assert torch.allclose(gradient({**made, "completion_ids": ids}), before, atol=1e-7)
    ids = made["completion_ids"].clone()
    free = [row for row in range(8) if not bool(out[row]) and float(made["advantages"][row]) != 0]
    made["advantages"][free[0]] += 1  # control: a row that is kept
    assert not torch.allclose(gradient({**made}), before, atol=1e-7)


def test_a_rule_may_stop_the_run(load_tiny: Any, tmp_path: Path) -> None:
    trainer = run_of(load_tiny, tmp_path, on_rollout={"truncated": "stop"}, max_completion_length=4)
    with pytest.raises(Fault, match="is truncated, and on_rollout says stop"):
        trainer.train()
    keeps = run_of(load_tiny, tmp_path / "kept", on_rollout={"truncated": "keep"}, max_completion_length=4, max_steps=1)
    keeps.train()
    assert keeps.state.log_history[0]["rollouts/truncated"] > 0
    counted = {f"rollouts/{'excluded_' if rule == 'exclude' else ''}{kind}" for kind, rule in RULES.items()}
    assert counted <= keeps.state.log_history[0].keys()


def test_batches_that_teach_nothing_stop_the_run_if_asked(load_tiny: Any, tmp_path: Path) -> None:
    trainer = faulty(load_tiny, tmp_path, "same", max_idle_steps=3)
    with pytest.raises(Fault, match="in 3 generation batches in a row no group's rewards differed"):
        trainer.train()
    assert kept(tmp_path) == [2]
    learns = run_of(load_tiny, tmp_path / "learns", max_idle_steps=3)
    learns.train()
    assert [row["rollouts/idle_batches"] for row in learns.state.log_history[:-1]] == [0.0] * 4


def test_a_reward_that_fails_leaves_the_last_whole_step(load_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward 'breaks' raised ValueError \(the third time\)"):
        faulty(load_tiny, tmp_path, "breaks").train()
    assert kept(tmp_path) == [2]


@pytest.mark.parametrize("kind", [Spoiled, SpoiledGradient])
def test_a_loss_that_is_no_number_never_reaches_the_parameters(
    load_tiny: Any, tmp_path: Path, kind: type[Spoiled]
) -> None:
    whole = run_of(load_tiny, tmp_path / "whole", latent_policy="gaussian", max_steps=2, lr_scheduler_type="constant")
    whole.train()
    after_two = whole.model.state_dict()

    stops = run_of(load_tiny, tmp_path, kind=kind, latent_policy="gaussian", lr_scheduler_type="constant")
    what = "gradient norm" if kind is SpoiledGradient else "loss"
    with pytest.raises(Fault, match=f"the {what} is no finite number after step 2 of 4"):
        stops.train()
    assert kept(tmp_path) == [2]
    assert all(torch.equal(tensor, after_two[name]) for name, tensor in stops.model.state_dict().items())

    skips = run_of(load_tiny, tmp_path / "skips", kind=kind, latent_policy="gaussian", max_steps=3,
                   on_nan_loss="skip", lr_scheduler_type="constant")  # fmt: skip
    skips.train()
    assert all(torch.equal(tensor, after_two[name]) for name, tensor in skips.model.state_dict().items())
    assert [row.get("skipped_updates") for row in skips.state.log_history[:-1]] == [None, None, 1.0]


def test_a_signal_gives_up_the_step_but_not_the_run(load_tiny: Any, tmp_path: Path) -> None:
    """Told to stop in the third generation: the step is given up there, and step 2 is kept."""
    trainer = run_of(load_tiny, tmp_path)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    interrupt.install(trainer)
    generate, calls = trainer.engine.generate, []

    def told(requests: Any, sampling: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the rollouts were not given up")
        return generate(requests, sampling)

    trainer.engine.generate = told
    trainer.train()
    assert interrupt.received == 15
    assert trainer.state.global_step == 2
    assert kept(tmp_path) == [2]
    assert issubclass(Abandoned, KeyboardInterrupt)
