"""Injection under DeepSpeed ZeRO-3, two real processes on the CPU, against the unsharded model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MIXED_ROWS, make_batch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import attach_feedback, feedback
from rl_lvr.latents.format import get_format
from rl_lvr.latents.spans import span_masks

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

WORKER = Path(__file__).with_name("zero3_worker.py")
RANKS = 2


@pytest.fixture(scope="module")
def runs(
    load_tiny: Callable[..., tuple[Any, Any]],
    tiny_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What the unsharded model gives, and what each rank gives."""
    work = tmp_path_factory.mktemp("zero3")
    model, processor = load_tiny("qwen2_5_vl")
    lvr = get_format("lvr")
    batch = make_batch(processor, MIXED_ROWS[:2], "left", [f"red{lvr.text(3)}green 2", f"{lvr.text(2)}1"])
    masks = span_masks(batch["input_ids"], lvr.bind(processor.tokenizer), batch["attention_mask"])
    positions = [torch.nonzero(row).flatten() for row in masks.latent]
    torch.manual_seed(0)
    latents = LatentBatch.from_rows([torch.randn(len(p), model.config.text_config.hidden_size) for p in positions],
                                    positions)  # fmt: skip
    save_file({**batch, **latents.as_tensors()}, work / "inputs.safetensors")

    attach_feedback(model, get_format("lvr", projector="linear", norm="embedding"))
    alone = {"feedback": feedback(model, torch.ones(1, latents.hidden_size)).detach()}
    latents.values.requires_grad_()
    with inject(model, latents):
        logits = model(**batch).logits
    logits.square().mean().backward()
    alone |= {"logits": logits.detach(), "latent_gradient": latents.values.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            alone["gradient." + name] = parameter.grad

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = subprocess.run(
        [*command, str(WORKER), str(tiny_folder("qwen2_5_vl")), str(work)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return alone, [load_file(work / f"rank{rank}.safetensors") for rank in range(RANKS)]


def test_the_model_was_sharded(runs: tuple[dict[str, Tensor], list[dict[str, Tensor]]]) -> None:
    """Control: on each rank the embedding's own tensor is empty, so only a gathered lookup can work."""
    assert [int(rank["sharded_elements"]) for rank in runs[1]] == [0] * RANKS


def test_the_sharded_forward_equals_the_unsharded_one(
    runs: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    alone, ranks = runs
    for rank in ranks:
        assert (rank["logits"] - alone["logits"]).abs().max() < 1e-4
        assert (rank["plain"] - alone["logits"]).abs().max() > 1e-2  # the control: without latents


def test_gradients_reach_latents_and_parameters(
    runs: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    alone, ranks = runs
    for rank in ranks:
        assert alone["latent_gradient"].abs().max() > 0
        assert torch.allclose(rank["latent_gradient"], alone["latent_gradient"], rtol=1e-3, atol=1e-7)
        gradients = [name for name in rank if name.startswith("gradient.")]
        assert len(gradients) == 2
        for name in gradients:
            assert alone[name].abs().max() > 0
            assert torch.allclose(rank[name], alone[name], rtol=1e-3, atol=1e-6), name


def test_the_feedback_map_is_made_from_a_sharded_embedding(
    runs: tuple[dict[str, Tensor], list[dict[str, Tensor]]],
) -> None:
    alone, ranks = runs
    for rank in ranks:
        assert torch.allclose(rank["feedback"], alone["feedback"], rtol=1e-5)
    assert not torch.allclose(alone["feedback"], torch.ones_like(alone["feedback"]), atol=1e-2)
