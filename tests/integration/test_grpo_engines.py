"""GRPO on the engine vllm: its first step is that of the engine hf, and weights arrive at every step. Real vLLM."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, SIGMAS, logged, make_trainer, settings
from vllm_cases import LENGTH, VLLMRig, thinking

from rl_lvr.errors import UserError
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.rollout.sleeping import Sleeper
from rl_lvr.rollout.types import Capability, Sampling
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.engines import make_engine

RUN = {"gradient_accumulation_steps": 2, "engine_sleep": True, "vllm_max_model_length": LENGTH}
OPTIONS = {
    "engine_args": {
        "enforce_eager": True,
        "num_gpu_blocks_override": 256,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
    }
}


@pytest.fixture(scope="module")
def folder(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking(tiny_folder, tmp_path_factory.mktemp("grpo_vllm"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `rl-lvr grpo` makes it; asleep, so that nothing works without new weights."""
    rig = VLLMRig(folder)
    made = make_engine(
        "vllm",
        OPTIONS,
        folder=folder,
        model=rig.model,
        processor=rig.processor,
        latent_format=LVR,
        config=LatentGRPOConfig(**settings(tmp_path_factory.mktemp("unused"), **RUN)),
    )
    yield made
    made.close()


def trained(folder: Path, out: Path, engine: Any = None, **changes: Any) -> Any:
    out.mkdir(exist_ok=True)
    rig = VLLMRig(folder)
    more = RUN if engine is not None else RUN | {"engine_sleep": None, "vllm_max_model_length": None}
    trainer = make_trainer(rig.model, rig.processor, out, LVR, engine=engine, **{**more, **changes})
    trainer.train()
    return trainer


def asleep(engine: Sleeper) -> bool:
    return bool(engine.engine.llm.llm_engine.is_sleeping())


@pytest.mark.parametrize("policy", ["context", "gaussian"])
def test_the_first_step_is_that_of_the_reference_engine(engine, folder, tmp_path, policy):
    """Temperature 1: tokens, rewards, seeds and latents, with exploration noise too. Control: another seed."""
    changes = {"latent_policy": policy, "latent_sigma": SIGMAS.get(policy, 0.0), "max_steps": 1}
    assert asleep(engine)
    one = trained(folder, tmp_path / "vllm", engine, **changes)
    assert asleep(engine)
    two = trained(folder, tmp_path / "hf", **changes)
    ours, theirs = (read_rollouts(tmp_path / name / "run") for name in ("vllm", "hf"))
    assert len(ours) == len(theirs) == 8
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.completion_ids, mine.rewards, mine.seed) == (other.completion_ids, other.rewards, other.seed)
        assert mine.spans == other.spans
    latents = [[found.latents(row) for row in range(8)] for found in (ours, theirs)]
    assert sum(int(batch.counts.sum()) for batch in latents[0]) > 3
    for mine, other in zip(*latents, strict=True):
        assert torch.equal(mine.positions, other.positions)
        assert (mine.values - other.values).abs().max() < 1e-3
    assert logged(one, "loss")[0] == pytest.approx(logged(two, "loss")[0], abs=1e-4)
    if policy == "context":
        trained(folder, tmp_path / "seed", **changes, seed=7)
        assert [r.completion_ids for r in read_rollouts(tmp_path / "seed" / "run")] != [r.completion_ids for r in ours]


def test_weights_arrive_at_every_step(engine, folder, tmp_path):
    trainer = trained(folder, tmp_path, engine, max_steps=3)
    assert len(logged(trainer, "loss")) == 3
    for metric in ("replay_logp_diff", "replay_latent_diff"):
        assert max(logged(trainer, f"latent/{metric}")) < 1e-3
    moved = VLLMRig(folder).model.state_dict()["lm_head.weight"] - trainer.model.state_dict()["lm_head.weight"]
    assert moved.abs().max() > 1e-4


def test_without_them_the_run_stops(engine, folder, tmp_path, monkeypatch):
    """The control: what arrives is always the weights of the first step."""
    real, calls, first = engine.engine.sync_weights, [], []

    def stale(model):
        first[:] = first or [deepcopy(model)]
        calls.append(model)
        real(first[0])

    monkeypatch.setattr(engine.engine, "sync_weights", stale)
    with pytest.raises(UserError, match="do not agree with their replay"):
        trained(folder, tmp_path, engine, max_steps=3, learning_rate=1e-2)
    assert len(calls) > 1
    assert asleep(engine)


def test_an_engine_that_keeps_its_weights_is_refused(engine, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "capabilities", engine.capabilities - {Capability.WEIGHTS})
    with pytest.raises(UserError, match="keeps the weights that it was started with"):
        trained(folder, tmp_path, engine)


def test_a_trainers_autocast_stays_outside(engine, folder, monkeypatch):
    rig = VLLMRig(folder)
    requests, sampling = rig.requests()[3:], Sampling(max_tokens=14, temperature=0.0)

    def latents():
        engine.sync_weights(rig.model)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([rollout.latents for rollout in engine.generate(requests, sampling)])

    engine.sync_weights(rig.model)
    plain = torch.cat([rollout.latents for rollout in engine.generate(requests, sampling)])
    assert len(plain) > 3
    assert torch.equal(latents(), plain)
    monkeypatch.setattr(engine.engine, "_run", engine.engine._finished)  # the control
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        latents()
