"""Latent SFT under DeepSpeed ZeRO-3, two real processes on the CPU, against one process without DeepSpeed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab_tools import logged, puzzles, sft, sft_command, sharded, weights

from rl_lvr.data.writing import write_parquet

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
pytestmark = pytest.mark.long

RANKS = 2
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "own_latents": 0.7,
    "own_latents_start": 0.0,
    "latent_projector": "mlp",
    "latent_objective": "cosine",  # a mean over latents: the mean of equal shares is the mean of the whole
    "latent_eval_steps": 4,
    "latent_eval_samples": 4,
    "latent_eval_max_tokens": 6,
    "latent_eval_conditions": ["own", "noise"],
    "save_strategy": "steps",
    "save_steps": 2,
}


def zero3(path: Path, gather: bool = True) -> Path:
    """A DeepSpeed config."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": gather,
        },
        "zero_allow_untested_optimizer": True,
    }
    path.write_text(json.dumps(config))
    return path


def parted(folder: Path) -> Path:
    """A folder with records of which one has no image."""
    records = puzzles(8)
    question = {"role": "user", "content": [{"type": "text", "text": "from red"}]}
    records[3] = replace(records[3], messages=(question, records[3].messages[-1]), images=(), latents=None)
    folder.mkdir()
    write_parquet(records, folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(place: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks `zero3`, then in new processes `resumed` and `mixed`; on one process `one`, and `other` by seed.

    What was refused stands in `refused.txt`.
    """
    work = tmp_path_factory.mktemp("zero3")
    model, data = place / "model", place / "data"
    both = SETTINGS | {"eval_file": data / "test.parquet"}
    assert sft(model, data, work / "one", per_device_train_batch_size=8, **both) == 0
    assert sft(model, data, work / "other", per_device_train_batch_size=8, seed=7, **both) == 0

    shards = {"use_cpu": True, "deepspeed": zero3(work / "zero3.json")}
    ungathered = shards | {"deepspeed": zero3(work / "ungathered.json", gather=False)}
    both |= shards | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    codes, said = sharded(
        work / "first",
        sft_command(model, data, work / "bad", **ungathered),
        sft_command(model, parted(work / "parted"), work / "bad", **shards),
        sft_command(model, data, work / "ruined", **shards, max_steps=1, learning_rate=1e39),
        sft_command(model, data, work / "zero3", **both),
    )
    assert codes == [2, 2, 1, 0], said
    (work / "refused.txt").write_text(said)
    codes, said = sharded(
        work / "second",
        sft_command(model, data, work / "resumed", resume_from_checkpoint=work / "zero3" / "checkpoint-2", **both),
        sft_command(model, mixed, work / "mixed", per_device_train_batch_size=1, max_steps=8, **shards),
    )
    assert codes == [0, 0], said
    return work


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in logged(out)]


def test_the_run_was_sharded(runs: Path) -> None:
    """Control: each rank saved a part of the weights."""
    parts = list((runs / "zero3" / "checkpoint-2" / "global_step2").glob("zero_pp_rank_*_model_states.pt"))
    assert len(parts) == RANKS


def test_the_loss_curve_is_that_of_one_process(runs: Path) -> None:
    assert losses(runs / "zero3") == pytest.approx(losses(runs / "one"), abs=1e-4)
    assert losses(runs / "zero3") != pytest.approx(losses(runs / "other"), abs=1e-2)
    for name in ("latent/cosine", "latent/own_share", "latent/accuracy_own", "latent/accuracy_noise", "latent/rate"):
        mine, theirs = ([row.get(name) for row in logged(runs / run)] for run in ("zero3", "one"))
        assert mine == [pytest.approx(value, abs=1e-4) for value in theirs], name
        assert any(value is not None for value in mine)


def test_the_saved_model_is_whole_and_that_of_one_process(runs: Path, place: Path) -> None:
    mine, theirs, start = weights(runs / "zero3"), weights(runs / "one"), weights(place / "model")
    assert {name: tensor.shape for name, tensor in mine.items()} == {n: t.shape for n, t in theirs.items()}
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        moved = (theirs[name] - start[name]).norm()
        assert moved > 0
        assert (mine[name] - theirs[name]).norm() < 0.01 * moved


def test_a_checkpoint_resumes(runs: Path) -> None:
    assert [row["step"] for row in logged(runs / "resumed")] == [3, 4]
    assert losses(runs / "resumed") == pytest.approx(losses(runs / "zero3")[2:], abs=1e-6)
    assert losses(runs / "resumed") != pytest.approx(losses(runs / "zero3")[:2], abs=1e-2)


def test_ranks_whose_batches_hold_different_kinds_of_records_keep_in_step(runs: Path) -> None:
    rows = logged(runs / "mixed")
    assert len(rows) == 8
    assert 0 < sum("latent/nmse" in row for row in rows) < 8


def test_what_would_part_the_ranks_or_save_no_model_is_refused(runs: Path) -> None:
    said = (runs / "refused.txt").read_text()
    assert "parted/train.parquet holds records with and without images" in said
    assert "set zero_optimization.stage3_gather_16bit_weights_on_model_save to true" in said
    assert not (runs / "bad").exists()


def test_weights_that_the_last_update_ruined_stop_all_ranks(runs: Path) -> None:
    said = (runs / "refused.txt").read_text()
    assert re.search(r"parameter \S+ is not finite after the update of step 1 of 1", said)
    assert not list((runs / "ruined").glob("*.safetensors"))
