"""What tests compile ahead of time, at the shapes of Qwen2.5-VL-7B: each kernel with every option on, and what the
probe launches, which has five regions and mostly no padding.
"""

from __future__ import annotations

from typing import Any

import torch

from rl_lvr.ops.attention_mass import triton_kernels as kernels
from rl_lvr.ops.attention_mass.triton_launch import Blocks, path_a_blocks, path_b_blocks, statistics_blocks
from rl_lvr.ops.backends import KernelExample

HEAD_DIM = 128
INT32 = ("positions", "starts", "heads", "columns")
INT64 = ("labels", "rows", "segments", "bounds")
NUMBERS = ("size", "queries", "keys", "width", "count", "regions", "group", "window")


def _type(name: str, dtype: str) -> str:
    if name in ("query", "key"):
        return f"*{dtype}"
    if name in INT32:
        return "*i32"
    if name in INT64:
        return "*i64"
    if name in NUMBERS or "_stride_" in name:
        return "i32"
    return "fp32" if name in ("scale", "softcap") else "*fp32"


def _example(name: str, kernel: Any, blocks: Blocks, dtype: str = "bf16", **more: Any) -> KernelExample:
    flags = {flag: True for flag in kernel.arg_names if flag.startswith("HAS_")}
    shape = {"D": HEAD_DIM, "BLOCK_D": HEAD_DIM, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys, "BLOCK_R": 4}
    # A stride of 1 is a constant to Triton, as in every launch with contiguous heads.
    fixed = {"q_stride_d": 1, "k_stride_d": 1, "UPCAST": False, "PRECISION": "ieee", **shape, **flags, **more}
    constants = {key: value for key, value in fixed.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants else _type(key, dtype) for key in kernel.arg_names}
    return KernelExample(f"attention_{name}", kernel, signature, constants, blocks.warps, blocks.stages)


def _examples() -> tuple[KernelExample, ...]:
    half, full = torch.bfloat16, torch.float32
    path_a = path_a_blocks(half, HEAD_DIM, 32)
    path_a_full = path_a_blocks(full, HEAD_DIM, 32)
    many: dict[str, Any] = {"BLOCK_R": 8}
    bare: dict[str, Any] = {flag: False for flag in kernels.mass_one_pass.arg_names if flag.startswith("HAS_")}
    return (
        _example("path_a_regions", kernels.mass_given_lse, path_a, REDUCE=True, **many),
        _example("path_a_regions_fp32", kernels.mass_given_lse, path_a_full, "fp32", REDUCE=True, **many),
        _example("path_a_regions_bare", kernels.mass_given_lse, path_a, REDUCE=True, **many, **bare),
        _example("path_b_regions", kernels.mass_one_pass, path_b_blocks(half, HEAD_DIM), **many),
        _example("path_b_regions_bare", kernels.mass_one_pass, path_b_blocks(half, HEAD_DIM), **many, **bare),
        _example("path_a", kernels.mass_given_lse, path_a, REDUCE=False),
        _example("path_a_reduced", kernels.mass_given_lse, path_a, REDUCE=True),
        _example("path_a_fp32", kernels.mass_given_lse, path_a_full, "fp32", REDUCE=True),
        _example("path_b", kernels.mass_one_pass, path_b_blocks(half, HEAD_DIM)),
        _example("path_b_fp32", kernels.mass_one_pass, path_b_blocks(full, HEAD_DIM), "fp32"),
        _example("statistics", kernels.statistics_one_pass, statistics_blocks(half, HEAD_DIM)),
        _example("statistics_fp32", kernels.statistics_one_pass, statistics_blocks(full, HEAD_DIM), "fp32"),
        _example("sum_entries", kernels.sum_entries, path_a, BLOCK_S=32),
    )


EXAMPLES = _examples()
"""What to compile ahead of time."""
