"""Floating-point operations of a text model's forward pass, and what a GPU could do: together, its utilisation (MFU).

MFU is the operations that the model needs for its tokens, divided by those that the hardware could have done in the
same time (PaLM, 2204.02311, appendix B). Recomputation, padding and the vision tower do not count as needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rl_lvr.errors import UserError

BACKWARD = 2
"""A backward pass costs twice its forward pass: gradients of inputs and of weights."""
DENSE_BFLOAT16 = {
    "A100": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}
"""Operations per second from NVIDIA's data sheets, on tensor cores with float32 accumulation, without sparsity (sheets
that print the sparse figure alone: half of it). Without another word the SXM part is meant."""
_OTHER_PARTS = {"MIG", "LAPTOP", "MAX", "D"}
"""Words of a name that make it another part than the table's: a slice of a GPU, notebooks, the 4090 D."""


def forward_flops(config: Any, lengths: Sequence[int], scored: int) -> float:
    """Operations of one forward of a dense decoder with gated MLPs over rows of `lengths` tokens, `scored` of whose
    positions go through the head. `config` is its text config.

    A multiply-add is two. Per layer and token 2 (H (n + 2 m) d + n d H + 3 H I) for the projections, with n query and
    m key heads of width d, and 4 n d T for attention in a row of T tokens: scores and values, the masked half counted.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    projections = 2 * hidden * ((2 * heads + 2 * keys) * width + 3 * config.intermediate_size)
    tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
    layers = config.num_hidden_layers * (projections * tokens + 4 * heads * width * pairs)
    return float(layers + 2 * hidden * config.vocab_size * scored)


def peak_of(name: str) -> float | None:
    """The peak of the GPU that CUDA calls `name`; None where the table does not have exactly that part."""
    words = name.upper().replace("-", " ").split()
    if _OTHER_PARTS & set(words):
        return None
    found = [part for part in DENSE_BFLOAT16 if set(part.split()) <= set(words)]
    return DENSE_BFLOAT16[max(found, key=len)] if found else None


def peak_flops(device: torch.device, dtype: torch.dtype, tflops: float | None = None) -> float | None:
    """What the hardware could do per second: `tflops`, where the user says so, else a known GPU in half precision.

    None where that is not known, and on other hardware.
    """
    if tflops is not None:
        if not tflops > 0:
            raise UserError(f"peak_tflops is {tflops}; it must be above 0.")
        return tflops * 1e12
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_of(torch.cuda.get_device_name(device))
