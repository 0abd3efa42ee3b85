"""Faults in a real run of GRPO: what stops it, what is left out, and that the last whole step is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, make_trainer, opening, rows, settings
from lab_tools import weights
from torch import Tensor

from rl_lvr.errors import Fault, UserError
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.rules import RULES
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.rewards.call import RewardError
from rl_lvr.training.rewards.load import load_rewards
from rl_lvr.training.runs.checkpoints import defect
from rl_lvr.training.runs.stopping import Abandoned, Interrupt

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

    def __init__(
        self, engine: HFRolloutEngine, fails_at: tuple[int, ...] = (), loses: bool = False, silent: bool = False
    ) -> None:
        self.engine, self.fails_at, self.loses, self.silent, self.calls = engine, fails_at, loses, silent, 0
        self.markers, self.capabilities = engine.markers, engine.capabilities

    def generate(self, requests: Any, sampling: Any) -> Any:
        self.calls += 1
        if self.calls in self.fails_at:
            raise ConnectionError("the engine is gone")
        rollouts = self.engine.generate(requests, sampling)
        if self.silent:
            nothing: dict[str, Any] = {"completion_ids": (), "latent_positions": ()}
            nothing |= {name: getattr(rollouts[1], name)[:0] for name in ("logprobs", "forced", "latents")}
            rollouts[1] = replace(rollouts[1], **nothing)
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

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        honest = self.run.policy.loss

        def spoiled(actions: Any) -> Any:
            found = honest(actions)
            spoils = self.state.global_step == 2 and self.spoils == "loss"
            return replace(found, loss=found.loss * torch.nan) if spoils else found

        self.run.policy.loss = spoiled


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
        load_rewards([f"{folder / 'faulty.py'}:{name}"]),
        LatentGRPOConfig(**settings(folder, max_steps=4, parity_check=False, **changes)),
        latent_format=LVR,
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


@pytest.mark.parametrize("rule", ["exclude", "keep"])
def test_a_rollout_without_any_token_is_empty(load_tiny: Any, tmp_path: Path, rule: str) -> None:
    trainer = run_of(load_tiny, tmp_path, {"silent": True}, on_rollout={"empty": rule, "unclosed": "keep"}, max_steps=1)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["rollouts/excluded_empty" if rule == "exclude" else "rollouts/empty"] == 0.25
    raw = torch.tensor(list(trainer._logs["rewards"]["letters"]))
    assert raw.isnan().tolist() == [False, rule == "exclude", False, False]
    assert row["num_tokens"] > 0
    assert bool(torch.isfinite(torch.tensor(row["grad_norm"])))


def by_hand(rewards: list[list[float]], weights: list[float], aggregation: str, scale: str) -> list[float]:
    """Advantages of groups of 4, as TRL documents them; NaN counts nowhere, and a row of them is 0."""

    def normal(values: list[float], deviation: float | None = None) -> list[float]:
        known = [value for value in values if not math.isnan(value)]
        deviation = statistics.stdev(known) if deviation is None else deviation
        return [(value - statistics.mean(known)) / (deviation + 1e-4) for value in values]

    if aggregation == "normalize_then_sum":
        columns = [
            [v for at in (0, 4) for v in normal(list(column[at : at + 4]))] for column in zip(*rewards, strict=True)
        ]
        return normal([sum(w * v for w, v in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)])
    totals = [sum(w * v for w, v in zip(weights, row, strict=True)) for row in rewards]
    whole = statistics.stdev([value for value in totals if not math.isnan(value)])
    deviation = {"group": None, "batch": whole, "none": 1 - 1e-4}[scale]
    return [value for at in (0, 4) for value in normal(totals[at : at + 4], deviation)]


def test_one_row_left_out_under_every_way_to_scale(load_tiny: Any, tmp_path: Path) -> None:
    trainer = run_of(load_tiny, tmp_path, reward_names=("letters", "first_half"), num_generations=4,
                     per_device_train_batch_size=8)  # fmt: skip
    trainer.run.generator.excluded = lambda rollouts: [row == 2 for row in range(len(rollouts))]
    weights = [1.0, 1.0]
    inputs = [dict(row) for row in rows(images=False, count=2) for _ in range(4)]
    found = {}
    for aggregation, scale in (
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ):
        trainer.multi_objective_aggregation, trainer.scale_rewards = aggregation, scale
        made = trainer._generate_and_score_completions([dict(row) for row in inputs])
        logs = trainer._logs["rewards"]
        rewards = [
            list(row) for row in zip(*(list(logs[name])[-8:] for name in ("letters", "first_half")), strict=True)
        ]
        assert [math.isnan(row[0]) for row in rewards] == [row == 2 for row in range(8)]
        expected = [0.0 if math.isnan(v) else v for v in by_hand(rewards, weights, aggregation, scale)]
        assert made["advantages"].tolist() == pytest.approx(expected, abs=1e-4)
        assert float(made["advantages"][2]) == 0
        found[aggregation, scale] = made["advantages"].tolist()
        rewards[2] = [0.0, 0.0]  # the control: it counts, as an answer that is worth nothing
        assert made["advantages"].tolist() != pytest.approx(by_hand(rewards, weights, aggregation, scale), abs=1e-2)
    assert len({tuple(values) for values in found.values()}) == 4


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
    trainer = run_of(load_tiny, tmp_path, on_rollout={"truncated": "stop"}, max_completion_length=5)
    with pytest.raises(Fault, match="is truncated, and on_rollout says stop"):
        trainer.train()
    keeps = run_of(load_tiny, tmp_path / "kept", on_rollout={"truncated": "keep"}, max_completion_length=5, max_steps=1)
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


class Struck(LatentGRPOTrainer):
    """Told to stop in the backward pass of the third step."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.state.global_step == 2:
            loss.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
        return loss


def test_a_step_that_is_given_up_leaves_adaptive_entropy_alone(load_tiny: Any, tmp_path: Path) -> None:
    """TRL moves it within the loss."""
    settings: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 100.0}
    whole = run_of(load_tiny, tmp_path / "whole", max_steps=2, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    struck = run_of(load_tiny, tmp_path / "struck", kind=Struck, **settings)
    interrupt = Interrupt()
    struck.add_callback(interrupt)
    interrupt.install(struck.stopping)
    struck.train()
    assert kept(tmp_path / "struck") == [2]
    one, two = (
        json.loads((tmp_path / name / "run" / "checkpoint-2" / "entropy_ctrl_state.json").read_text())
        for name in ("whole", "struck")
    )
    assert one["entropy_coef"] == two["entropy_coef"] == struck.entropy_coef > 0.01
    assert struck._entropy_window_stats is None
    again = run_of(load_tiny, tmp_path / "struck", **settings | {"max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "struck" / "run" / "checkpoint-2"))
    assert again.entropy_coef > struck.entropy_coef  # the control: a whole step moves it


def test_a_signal_gives_up_the_step_but_not_the_run(load_tiny: Any, tmp_path: Path) -> None:
    """Told to stop in the third generation: the step is given up there, and step 2 is kept."""
    trainer = run_of(load_tiny, tmp_path)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    interrupt.install(trainer.stopping)
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


def test_a_run_that_opens_no_spans_says_so_once(
    load_tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = opening(load_tiny, times=0.0)  # START's logit is 0, far below the largest
    make_trainer(model, processor, tmp_path, max_steps=3, temperature=0.2, max_completion_length=6).train()
    said = [record.getMessage() for record in caplog.records if "starts a latent span" in record.getMessage()]
    assert len(said) == 1
    assert "never starts a latent span: latent/rate was 0 in 2 generation batches" in said[0]
