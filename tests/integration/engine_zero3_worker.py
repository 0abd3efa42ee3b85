"""One rank of test_engine_zero3.py: a model that ZeRO-3 has spread, its weights on their way, a vLLM beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu_runtime_env  # noqa: F401 - before all others
import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.integrations import HfDeepSpeedConfig
from vllm_cases import LENGTH, VLLMRig, opened
from zero3_worker import config

from rl_lvr.accelerated import group_ended
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.sleeping import Sleeper
from rl_lvr.rollout.types import Sampling
from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine
from rl_lvr.rollout.vllm.weights import Receipt, checkpoint_weights

BUCKET = 40_000


def streamed(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The weights that pass, and the most bytes that were whole on this rank at a time."""
    weights, most = {}, 0
    for name, value in checkpoint_weights(model, torch.float32, Receipt(), bucket=BUCKET):
        weights[name] = value.clone()
        whole = [p for p in model.parameters() if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE]
        most = max(most, sum(p.numel() * p.element_size() for p in whole))
    return weights, most


class Sleepy:
    """An engine that finds no memory to wake up with on one of the ranks."""

    markers = capabilities = None

    def wake(self) -> None:
        if torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("no memory to wake up with")

    def sleep(self, level: int) -> None: ...

    def sync_weights(self, model: Any) -> None:
        streamed(model)


def main(started: Path, trained: Path, work: Path) -> None:
    # Plain gloo: DeepSpeed would compile a shared-memory reduction first, two minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rig = VLLMRig(started)
    _sharding = HfDeepSpeedConfig(config(ranks))  # from_pretrained shards as long as this object lives
    model = AutoModelForImageTextToText.from_pretrained(trained)
    facts: dict[str, Any] = {"own": sum(p.numel() for p in model.parameters())}
    plain, facts["most"] = streamed(model)
    save_file(plain, work / f"plain{rank}.safetensors")

    try:
        Sleeper(Sleepy()).sync_weights(model)
        facts["woke"] = True
    except torch.OutOfMemoryError:
        facts["woke"] = False

    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING")  # the engine must find by itself that it lives here
    engine = VLLMRolloutEngine(
        started,
        rig.processor,
        get_format("lvr", k=3),
        max_model_len=LENGTH,
        max_num_seqs=4,
        dtype="float32",
        colocated=True,
        engine_args={
            "enforce_eager": True,
            "num_gpu_blocks_override": 256,
            "limit_mm_per_prompt": {"image": 2, "video": 0},
        },
    )
    requests = opened(rig.requests(), engine.markers.start)[rank : rank + 2]  # other work for each rank
    sampling = Sampling(max_tokens=14, temperature=1.0, seed=rank)
    facts["before"] = [list(r.completion_ids) for r in engine.generate(requests, sampling)]
    engine.sync_weights(model)
    facts["after"] = [list(r.completion_ids) for r in engine.generate(requests, sampling)]
    engine.close()
    alive = torch.tensor([rank + 1])
    torch.distributed.all_reduce(alive)  # the trainer's group has outlived the engine
    facts["sum"] = int(alive)

    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=9)
    )
    save_file(streamed(adapted)[0], work / f"adapted{rank}.safetensors")
    (work / f"rank{rank}.json").write_text(json.dumps(facts))
    torch.distributed.barrier()


if __name__ == "__main__":
    with group_ended():
        main(*map(Path, sys.argv[1:]))
