"""What vLLM leaves undone in a worker on a CPU. On a GPU nothing here is called."""

from __future__ import annotations

import torch

from rl_lvr.errors import UserError


def prepare(dtype: torch.dtype) -> None:
    """Make ready for a model of this precision; UserError if the machine cannot run it."""
    from vllm.model_executor.models import qwen3_vl
    from vllm.v1.sample.ops import topk_topp_sampler

    # Kernels that Triton's interpreter cannot run, or not in bf16. Without Triton vLLM has torch for them.
    topk_topp_sampler.HAS_TRITON = False
    qwen3_vl.HAS_TRITON = False
    allow_tiles(dtype)


def allow_tiles(dtype: torch.dtype) -> None:
    """Ask the kernel for AMX, which vLLM's bf16 attention uses wherever the CPU has it, without asking: SIGILL.

    Linux gives tile registers to processes that ask only (arch_prctl, ARCH_REQ_XCOMP_PERM).
    """
    if dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise UserError(
            "this system does not let processes use the CPU's AMX registers, which vLLM needs for bfloat16: "
            "choose dtype float32."
        )
