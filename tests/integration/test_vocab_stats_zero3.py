"""Statistics under a head that DeepSpeed ZeRO-3 has sharded, two real processes on the CPU, against the whole head."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")

WORKER = Path(__file__).with_name("vocab_stats_zero3_worker.py")
KINDS = ("plain", "tied", "lora")
PASSES = ("kept", "recomputed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each rank found; `hidden` is what it was given."""
    work = tmp_path_factory.mktemp("zero3")
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5))
    save_file({"hidden": hidden}, work / "inputs.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(work)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [{**load_file(work / f"rank{rank}.safetensors"), "hidden": hidden[rank]} for rank in range(2)]


def whole_head(kind: str) -> Any:
    from vocab_stats_zero3_worker import Model

    torch.manual_seed(0)
    model = Model(tied=kind == "tied")
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        return adapted.model.lm_head
    return model.lm_head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PASSES)
def test_entropy_and_its_gradient_equal_those_of_the_whole_head(
    ranks: list[dict[str, Tensor]], kind: str, name: str
) -> None:
    head = whole_head(kind)
    for found in ranks:
        hidden = found["hidden"].clone().requires_grad_()
        logp = head(hidden).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        entropy.square().sum().backward()
        torch.testing.assert_close(found[f"{kind}.{name}.entropy"], entropy.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[f"{kind}.{name}.gradient"], hidden.grad, rtol=1e-4, atol=1e-6)
        assert hidden.grad.abs().max() > 1e-3


def test_each_rank_had_rows_of_its_own(ranks: list[dict[str, Tensor]]) -> None:
    assert not torch.allclose(ranks[0]["plain.kept.entropy"], ranks[1]["plain.kept.entropy"], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_gathered_between_forward_and_backward(ranks: list[dict[str, Tensor]], kind: str) -> None:
    """Else the comparison above would not have shown that the backward pass gathers."""
    for found in ranks:
        for name in PASSES:
            assert int(found[f"{kind}.{name}.own"]) == int(found[f"{kind}.{name}.callers"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_weight_as_it_is_is_refused(ranks: list[dict[str, Tensor]], kind: str) -> None:
    assert all(bool(found[f"{kind}.refused"]) for found in ranks)
