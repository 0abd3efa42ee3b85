"""One rank of test_inject_zero3.py: an injected forward and backward of a model that ZeRO-3 has sharded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.integrations import HfDeepSpeedConfig

from rl_lvr.accelerated import group_ended
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import attach_feedback, feedback
from rl_lvr.latents.format import get_format
from rl_lvr.wrapping import input_embeddings


def config(ranks: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def main(model_folder: Path, work: Path) -> None:
    # Plain gloo: DeepSpeed would compile a shared-memory reduction first, two minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before the model is loaded: the shards need a backend that the CPU has.
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    _sharding = HfDeepSpeedConfig(config(ranks))  # from_pretrained shards as long as this object lives
    model = AutoModelForImageTextToText.from_pretrained(model_folder)
    out = {"sharded_elements": torch.tensor(input_embeddings(model).weight.numel())}
    attach_feedback(model, get_format("lvr", projector="linear", norm="embedding"))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config(ranks)
    )
    inputs = load_file(work / "inputs.safetensors")
    batch = {name: tensor for name, tensor in inputs.items() if not name.startswith("latent_")}
    latents = LatentBatch.from_tensors(inputs)
    latents.values.requires_grad_()

    with torch.no_grad():
        out["plain"] = engine(**batch).logits
        out["feedback"] = feedback(engine, torch.ones(1, latents.hidden_size))
    with inject(engine, latents):
        logits = engine(**batch).logits
    engine.backward(logits.square().mean())
    out["logits"] = logits.detach()
    out["latent_gradient"] = latents.values.grad
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if gradient is not None and name.endswith(("embed_tokens.weight", "layers.0.self_attn.q_proj.weight")):
            out["gradient." + name] = gradient
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, work / f"rank{rank}.safetensors")
    torch.distributed.barrier()


if __name__ == "__main__":
    with group_ended():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
