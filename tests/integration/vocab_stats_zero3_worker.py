"""One rank of test_vocab_stats_zero3.py: statistics under a head that ZeRO-3 has sharded, and their backward pass."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rl_lvr.accelerated import group_ended
from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import head_weights, vocab_stats


class Model(nn.Module):
    """A body, and a head that may be tied to the embedding."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(301, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 301, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body(self.embed(ids))


def entropy_and_gradient(
    model: nn.Module, head: nn.Module, hidden: torch.Tensor, workspace_bytes: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Entropies, dL/dhidden, and the elements of the head's weight between the passes: of its own, of the caller's."""
    hidden = hidden.clone().requires_grad_()
    with head_weights(head) as weights:
        stats = vocab_stats(
            hidden, weights.weight, bias=weights.bias, lora=weights.lora, workspace_bytes=workspace_bytes
        )
    held = sum(p.numel() for p in head.parameters()), weights.weight.numel()
    stats.entropy.square().sum().backward()
    assert hidden.grad is not None
    return stats.entropy.detach(), hidden.grad, *held


def config(ranks: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": ranks,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def main(work: Path) -> None:
    # Plain gloo: DeepSpeed would compile a shared-memory reduction first, two minutes and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    inputs = load_file(work / "inputs.safetensors")
    out = {}
    for kind in ("plain", "tied", "lora"):
        torch.manual_seed(0)
        model: nn.Module = Model(tied=kind == "tied")
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config(ranks)
        )
        head = engine.module.model.lm_head if kind == "lora" else engine.module.lm_head
        engine(torch.tensor([[1, 2]]))
        for name, workspace_bytes in (("kept", 1 << 20), ("recomputed", 4 * 6 * 140)):
            # Each rank has rows of its own, as in training.
            entropy, gradient, own, callers = entropy_and_gradient(
                engine.module, head, inputs["hidden"][rank], workspace_bytes
            )
            out |= {f"{kind}.{name}.entropy": entropy, f"{kind}.{name}.gradient": gradient}
            out |= {f"{kind}.{name}.own": torch.tensor(own), f"{kind}.{name}.callers": torch.tensor(callers)}
        weight = head.base_layer.weight if kind == "lora" else head.weight
        refused = False
        try:
            vocab_stats(inputs["hidden"][rank], weight.detach())
        except UserError:
            refused = True
        out[f"{kind}.refused"] = torch.tensor(refused)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, work / f"rank{rank}.safetensors")
    torch.distributed.barrier()


if __name__ == "__main__":
    with group_ended():
        main(Path(sys.argv[1]))
