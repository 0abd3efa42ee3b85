"""What latent SFT refuses: one line, and nothing written over anything."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import puzzles, sft, weights

from rl_lvr.data.writing import write_parquet
from rl_lvr.latents.format import FORMAT_FILE


def test_the_format_goes_with_the_checkpoint_and_disagreement_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sft(place / "model", place / "data", tmp_path / "first") == 0
    stored = json.loads((tmp_path / "first" / FORMAT_FILE).read_text())
    assert (stored["name"], stored["k"]) == ("lvr", 3)
    capsys.readouterr()
    assert sft(tmp_path / "first", place / "data", tmp_path / "second", latent_format="lantern") == 2
    assert "was trained with latent format 'lvr'" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
    assert sft(tmp_path / "first", place / "data", tmp_path / "third", latent_format=None) == 0  # its own format


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_format": "lvx"}, "did you mean 'lvr'"),
        ({"latent_format": "monet"}, "set add_marker_tokens to true"),
        ({"latent_k": 0}, "k is 0"),
        ({"latent_k": 4}, "cannot share 3 targets evenly"),
        ({"latent_format": "none"}, "latent_k is set"),
        ({"latent_format": "none", "latent_k": None, "own_latents": 0.5}, "own_latents cannot be used without"),
        ({"latent_format": "none", "latent_k": None, "oracle": "crop"}, "oracle cannot be used without"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"stop_at": "loss"}, "stop_at"),
        ({"packing": True}, "packing cannot be used on records"),
        ({"max_length": 64}, "max_length cannot be used on records"),
        ({"load_in_4bit": True}, "load_in_4bit has no effect here"),
        ({"lora_r": 4}, "lora_r cannot be used while use_peft is false"),
        ({"own_latents_end": 0.5}, "own_latents_end cannot be used while own_latents is 0"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "lm_head"),
        ({"use_peft": True, "freeze_merger": False}, "vision parts frozen"),
        ({"resume_from_checkpoint": "latest"}, "nothing to resume"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: dict[str, Any], words: str
) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out, **settings) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rl-lvr: ")
    assert words in last
    assert not out.exists()


def test_an_earlier_run_is_not_overwritten(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out) == 0
    before = weights(out)
    assert sft(place / "model", place / "data", out) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert sft(place / "model", place / "data", out, overwrite=True, seed=5) == 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    inside = out / "data"
    shutil.copytree(place / "data", inside)
    assert sft(place / "model", inside, out, overwrite=True) == 2
    assert "would delete" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert sft(place / "model", place / "data", tmp_path / "mine", overwrite=True) == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, messages=r.messages[:-1], latents=None), "no answer to learn from"),
        (
            lambda r: replace(
                r,
                messages=(
                    *r.messages[:-1],
                    {"role": "assistant", "content": [{"type": "text", "text": "<|image_pad|>"}]},
                ),
                latents=None,
            ),
            "stands for an image",
        ),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_records_that_cannot_be_learned_from_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: Any, words: str, cached: bool
) -> None:
    records = puzzles(8)
    records[5] = change(records[5])
    write_parquet(records, tmp_path / "train.parquet")
    assert sft(place / "model", tmp_path, tmp_path / "out", processed_cache=cached) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert records[5].id in error
    assert not (tmp_path / "out").exists()


def test_an_eval_file_that_nothing_reads_is_only_warned_of(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"eval_file": place / "data" / "test.parquet", "max_steps": 1}
    assert sft(place / "model", place / "data", tmp_path / "out", **given) == 0
    said = [record.getMessage() for record in caplog.records if "eval_file" in record.getMessage()]
    assert said == ["eval_file is set but nothing reads it: set latent_eval_steps or eval_strategy to evaluate."]


def test_a_record_and_a_k_beyond_the_models_positions_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for k, words in ((1_000_000, "k is 1000000: a span takes 1000002 tokens"), (4080, "and 4096 is the most in all")):
        out = tmp_path / str(k)
        assert sft(place / "model", place / "data", out, latent_k=k) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
