"""Latent SFT that is interrupted goes on to the same bits, and only with what it was started with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lab_tools import build_model, logged, same, sft, sft_command, weights


def test_an_interrupted_run_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a real process; then the same command with --resume_from_checkpoint latest."""
    settings = {"max_steps": 40, "own_latents": 0.7, "own_latents_start": 0.0, "latent_projector": "mlp"}
    assert sft(place / "model", place / "data", tmp_path / "whole", **settings) == 0

    out = tmp_path / "cut"
    command = [sys.executable, "-m", "rl_lvr.cli", *sft_command(place / "model", place / "data", out, **settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "--resume_from_checkpoint latest" in error
    assert "Traceback" not in error
    steps = [int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*")]
    assert len(steps) == 1
    assert 3 <= steps[0] < 40
    assert not same(out / f"checkpoint-{steps[0]}", tmp_path / "whole")

    assert sft(place / "model", place / "data", out, resume_from_checkpoint="latest", **settings) == 0
    assert same(out, tmp_path / "whole")
    assert [row["step"] for row in logged(out)] == list(range(1, 41))  # no row lost, none twice

    assert sft(place / "model", place / "data", tmp_path / "other", seed=7, **settings) == 0
    assert not same(tmp_path / "other", tmp_path / "whole")


def test_adapters_resume_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    settings = {"use_peft": True, "lora_target_modules": "all-linear", "latent_projector": "mlp", "max_steps": 4}
    saved = {"save_strategy": "steps", "save_steps": 2}
    assert sft(place / "model", place / "data", tmp_path / "whole", **settings, **saved) == 0
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "cut")
    assert sft(place / "model", place / "data", tmp_path / "cut", resume_from_checkpoint="latest", **settings) == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    assert not same(tmp_path / "cut" / "checkpoint-2", tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_not_resumed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """transformers' own loading would go on from the model's first weights and only warn."""
    build_model(tmp_path / "wide", hidden=96, heads=3)
    assert sft(tmp_path / "wide", place / "data", tmp_path / "out", save_strategy="steps", save_steps=1) == 0
    capsys.readouterr()
    shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    code = sft(place / "model", place / "data", tmp_path / "new", resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert code == 2
    assert "does not belong to this model" in capsys.readouterr().err


def test_resuming_with_another_format_or_over_another_run_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    saved = {"save_strategy": "steps", "save_steps": 1}
    assert sft(place / "model", place / "data", out, **saved) == 0
    capsys.readouterr()
    before = weights(out)
    resume = {"resume_from_checkpoint": "latest", "max_steps": 3}
    assert sft(place / "model", place / "data", out, latent_format="lantern", **resume) == 2
    assert "resume with the settings that it was started with" in capsys.readouterr().err
    assert sft(place / "model", place / "data", tmp_path / "other") == 0
    kept = weights(tmp_path / "other")
    code = sft(place / "model", place / "data", tmp_path / "other", resume_from_checkpoint=out / "checkpoint-1")
    assert code == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(tmp_path / "other").items())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())

    (out / "checkpoint-9").mkdir()  # cut off in the middle of writing
    assert sft(place / "model", place / "data", out, **resume) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_the_best_model_is_loaded_whole(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = sft(
        place / "model",
        place / "data",
        out,
        eval_file=place / "data" / "test.parquet",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.3,  # far too large: the first step is the best
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    assert code == 0
    best = Path(json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name != "checkpoint-3"
    assert same(out, best)
    assert not same(out, out / "checkpoint-3")


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    settings = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_steps": 4}  # the first update ruins it
    assert sft(place / "model", place / "data", out, **settings) == 1
    assert "is no finite number after step 1 of 4" in capsys.readouterr().err
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert sft(place / "model", place / "data", tmp_path / "skips", on_nan_loss="skip", **settings) == 0
    assert same(tmp_path / "skips", out / "checkpoint-1")
