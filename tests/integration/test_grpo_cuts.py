"""GRPO whose engine cuts its distribution (top_k, top_p, min_p, a penalty): ratio, gradient, metrics, warning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import generation, gradients, logged, make_trainer, opening

from rl_lvr.errors import Fault
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.rollout.types import Rollout
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer

CUTS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.5},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "temperature": 1.5},
}
WARNING = "the mean importance ratio"


def told_otherwise(change: Callable[[Rollout], Rollout]) -> type[LatentGRPOTrainer]:
    """A trainer whose engine reports other rollouts than it made."""

    class Told(LatentGRPOTrainer):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            honest = self.run.generator.rollouts
            self.run.generator.rollouts = lambda *asked: [change(rollout) for rollout in honest(*asked)]

    return Told


AfterTheCut = told_otherwise(lambda rollout: replace(rollout, uncut=None))
"""An engine that does not report its cut: the log-probs of the draw pass for those of the whole softmax."""


def run(
    load_tiny: Any, folder: Path, kind: Any = LatentGRPOTrainer, **changes: Any
) -> tuple[Any, dict[str, Any], float]:
    """A trainer, its first generation batch, and the norm of the gradient under given advantages."""
    trainer = make_trainer(*opening(load_tiny), folder, kind=kind, **changes)
    made = generation(trainer)
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    norm = torch.stack([g.norm() for g in gradients(trainer, made).values()]).norm()
    return trainer, made, float(norm)


@pytest.fixture(scope="module")
def whole_norm(load_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> float:
    return run(load_tiny, tmp_path_factory.mktemp("whole"))[2]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_leaves_ratio_and_gradient_as_they_are(
    load_tiny: Any, tmp_path: Path, whole_norm: float, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, made, norm = run(load_tiny, tmp_path, **CUTS[name])
    seen = trainer._metrics["train"]
    assert torch.allclose(made["importance_sampling_ratio"], torch.ones(4, 1), atol=1e-3)
    assert seen["latent/importance_ratio"] == pytest.approx([1.0], abs=1e-3)
    assert 0.2 < norm / whole_norm < 5
    assert seen["latent/replay_logp_diff"][0] < 1e-4
    (kept,) = seen["latent/kept_mass"]
    assert kept == 1.0 if name == "penalty" else 0 < kept < 0.95
    assert not warnings_of(caplog)
    rows = [r for r in read_rollouts(tmp_path / "run") if r.log_kept_mass and r.completion_ids]
    assert len(rows) == 4
    assert all(len(r.log_kept_mass or ()) == len(r.completion_ids or ()) for r in rows)
    assert any(any(r.log_kept_mass or ()) for r in rows) == (kept < 1)


def test_the_gradient_of_log_probs_after_the_cut_vanishes_and_the_run_says_so(
    load_tiny: Any, tmp_path: Path, whole_norm: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: what became of every run with top_k before engines told what they kept."""
    with pytest.raises(Fault, match="do not agree with their replay: the largest difference of log-probs"):
        run(load_tiny, tmp_path, AfterTheCut, top_k=3, parity_check=False)
    with pytest.raises(Fault, match="the engine does not agree with the model"):
        run(load_tiny, tmp_path, AfterTheCut, top_k=3)
    trainer, made, norm = run(load_tiny, tmp_path, AfterTheCut, top_k=3, replay_tolerance=100.0)
    assert norm < 0.05 * whole_norm
    assert trainer._metrics["train"]["latent/importance_ratio"][0] < 0.5
    (said,) = warnings_of(caplog)
    assert "outside of 0.9 to 1.1" in said
    trainer.checks.check_ratio(made, with_latents=True)
    assert len(warnings_of(caplog)) == 1  # once in a run


@pytest.mark.parametrize(("off", "warns"), [(0.05, False), (-0.05, False), (0.2, True), (-0.2, True)])
def test_only_a_ratio_outside_of_the_band_warns(
    load_tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, off: float, warns: bool
) -> None:
    Off = told_otherwise(lambda r: replace(r, logprobs=torch.where(r.forced, r.logprobs, r.logprobs - off)))
    mode = {"vllm_importance_sampling_mode": "token_truncate"}
    trainer = make_trainer(*opening(load_tiny), tmp_path, kind=Off, replay_tolerance=1.0, **mode)
    generation(trainer)
    assert trainer._metrics["train"]["latent/importance_ratio"] == pytest.approx([math.exp(off)], rel=1e-3)
    assert trainer._metrics["train"]["latent/kept_mass"] == [1.0]
    assert bool(warnings_of(caplog)) == warns


def test_decisions_of_free_length_are_compared_before_the_cut(load_tiny: Any, tmp_path: Path) -> None:
    free = get_format("lvr", k=4, length="free")
    trainer = make_trainer(
        *opening(load_tiny, free, times=8.0), tmp_path, free, top_p=0.6, temperature=1.5, max_steps=2
    )
    trainer.train()
    assert min(logged(trainer, "latent/rate")) > 0
    assert max(logged(trainer, "latent/replay_logp_diff")) < 1e-4
    assert logged(trainer, "latent/importance_ratio") == pytest.approx([1.0, 1.0], abs=1e-3)
    assert max(logged(trainer, "latent/kept_mass")) < 0.95


def test_start_is_out_of_the_softmax_where_no_engine_draws_it(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, get_format("lvr", feedback="none"))
    made = generation(trainer)
    assert torch.allclose(made["importance_sampling_ratio"], torch.ones(4, 1), atol=1e-3)
    assert trainer._metrics["train"]["latent/replay_logp_diff"][0] < 1e-4
