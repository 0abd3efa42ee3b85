"""Floating-point operations of a text model's forward pass, and what a GPU could do: together, its utilisation (MFU).

MFU is the operations that the model needs for its tokens, divided by those that the hardware could have done in the
same time (PaLM, 2204.02311, appendix B). Recomputation, padding and the vision tower do not count as needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

BACKWARD = 2
"""A backward pass costs twice its forward pass: gradients of inputs and of weights."""
_DENSE_BFLOAT16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "A10": 125e12}
"""Vendor's figures per second, without sparsity, of the SXM part where there are several."""


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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the GPU could do per second in half precision; None where that is not known, and on other hardware."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in _DENSE_BFLOAT16.items() if part in name.replace("-", " ").split()), None)
