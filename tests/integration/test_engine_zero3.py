"""Two processes with a model that ZeRO-3 has spread, each with a vLLM: weights in buckets, groups that live on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_zero3_worker import BUCKET
from safetensors.torch import load_file
from vllm_cases import VLLMRig, opened, thinking

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.types import Sampling

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

RANKS = 2
pytestmark = pytest.mark.timeout(600)
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What vLLM starts on, and what was trained from it."""
    started = thinking(tiny_folder, tmp_path_factory.mktemp("started"), "qwen2_5_vl")
    rig = VLLMRig(started)
    generator = torch.Generator().manual_seed(1)
    for parameter in rig.model.parameters():
        parameter.data += 0.1 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator)
    trained = tmp_path_factory.mktemp("trained") / started.name
    rig.model.save_pretrained(trained)
    rig.processor.save_pretrained(trained)
    return started, trained


@pytest.fixture(scope="module")
def work(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    worker = Path(__file__).with_name("engine_zero3_worker.py")
    path = os.pathsep.join((str(TESTS), os.environ.get("PYTHONPATH", "")))
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", str(worker)]
        + [str(folder) for folder in (*folders, work)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def facts(work: Path) -> list[dict[str, Any]]:
    return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_streamed_weights_are_those_of_the_whole_model(folders: tuple[Path, Path], work: Path) -> None:
    expected = load_file(folders[1] / "model.safetensors")
    for rank in range(RANKS):
        found = load_file(work / f"plain{rank}.safetensors")
        assert sorted(value.shape for value in found.values()) == sorted(value.shape for value in expected.values())
        model = VLLMRig(folders[1]).model.state_dict()
        assert set(found) == set(model)
        assert all(torch.equal(value, model[name]) for name, value in found.items())


def test_no_more_than_a_bucket_is_whole_at_a_time(folders: tuple[Path, Path], work: Path) -> None:
    parameters = [p.numel() * p.element_size() for p in VLLMRig(folders[1]).model.parameters()]
    for rank in facts(work):
        assert rank["own"] == 0  # the control: nothing was whole before
        assert 0 < rank["most"] <= max(BUCKET, *parameters)
        assert rank["most"] < sum(parameters) / 4


def test_adapters_are_merged_on_the_way(folders: tuple[Path, Path], work: Path) -> None:
    plain, adapted = (load_file(work / f"{name}0.safetensors") for name in ("plain", "adapted"))
    assert set(plain) == set(adapted)
    changed = {name for name in plain if not torch.equal(plain[name], adapted[name])}
    assert changed
    assert all("q_proj" in name or "down_proj" in name for name in changed)
    other = load_file(work / "adapted1.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in adapted.items())


def test_each_rank_has_an_engine_of_its_own_with_the_trained_weights(folders: tuple[Path, Path], work: Path) -> None:
    """Tokens at temperature 1 are those of the reference engine on the trained model. Control: before the sync."""
    rig = VLLMRig(folders[1])
    engine = rig.engine(get_format("lvr", k=3))
    requests = opened(rig.requests(), engine.markers.start)
    for rank, found in enumerate(facts(work)):
        sampling = Sampling(max_tokens=14, temperature=1.0, seed=rank)
        expected = [list(r.completion_ids) for r in engine.generate(requests[rank : rank + 2], sampling)]
        assert found["after"] == expected
        assert found["before"] != expected


def test_a_rank_that_does_not_wake_up_keeps_no_other_waiting(work: Path) -> None:
    """It gathers the weights with the others before it says so; else `work` would wait for ever."""
    assert [rank["woke"] for rank in facts(work)] == [True, False]


def test_the_trainers_group_outlives_the_engines(work: Path) -> None:
    assert [rank["sum"] for rank in facts(work)] == [3, 3]
