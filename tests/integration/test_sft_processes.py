"""Latent SFT in two processes equals one process: DDP over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import logged, sft_command, torchrun, weights

pytestmark = pytest.mark.long


def launch(processes: int, place: Path, data: Path, out: Path, **settings: Any) -> Path:
    """A real launch; returns the run's folder."""
    command = sft_command(place / "model", data, out, use_cpu=True, ddp_backend="gloo", **settings)
    torchrun(processes, "-m", "rl_lvr.cli", *command)
    return out


def test_two_processes_train_a_projector_as_one_does(place: Path, tmp_path: Path) -> None:
    """Half the batch each, the same weights as one process within rounding."""
    settings = {
        "latent_projector": "mlp",
        "latent_objective": "cosine",  # a mean over latents: the mean of two halves is the mean of the whole
        "max_steps": 3,
        "learning_rate": 1e-4,
        "optim": "sgd",
        "max_grad_norm": 0,
        "warmup_steps": 0,
    }
    one, two = (
        launch(
            processes,
            place,
            place / "data",
            tmp_path / str(processes),
            **settings,
            per_device_train_batch_size=8 // processes,
        )
        for processes in (1, 2)
    )
    # 3 steps of 8 records out of 48, however many processes share them
    assert [logged(out)[-1]["epoch"] for out in (one, two)] == [0.5, 0.5]
    start, mine, theirs = weights(place / "model"), weights(one), weights(two)
    start["latent_proj.down.weight"] = torch.zeros_like(mine["latent_proj.down.weight"])
    for name in ("latent_proj.down.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        moved, apart = (mine[name] - start[name]).abs().max(), (mine[name] - theirs[name]).abs().max()
        assert moved > 0
        assert apart < 0.01 * moved, name


def test_two_processes_with_different_kinds_of_records_do_not_wait_for_each_other(
    place: Path, mixed: Path, tmp_path: Path
) -> None:
    out = launch(2, place, mixed, tmp_path / "out", per_device_train_batch_size=1, max_steps=12)
    assert (out / "model.safetensors").is_file()
