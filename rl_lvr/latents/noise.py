"""Gaussian noise keyed by (request seed, absolute position): no generator state, so no order to get wrong.

The same vector comes out in any batch, on any rank, after a preemption and in any engine. Counter based:
SplitMix64 of (seed, position, index) gives the uniforms, Box-Muller the normals. Computed in float64: the last bits
of log, cos and sin differ between devices and vector widths, and rounding to float32 takes them away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood 2014), as signed 64-bit: torch's int64 multiplication wraps around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(bits: Tensor) -> Tensor:
    """Random 64-bit words -> float64 in the open interval (0, 1): 52 bits and a half step are exact."""
    return (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52


def _splitmix(x: Tensor) -> Tensor:
    x = x + _GAMMA
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_normal(seed: Tensor, position: Tensor, size: int) -> Tensor:
    """Standard normal vectors [N, size] in float32 for keys `seed` [N] and `position` [N], both int64."""
    key = _splitmix(_splitmix(seed.long()) ^ position.long())
    pairs = (size + 1) // 2
    counter = torch.arange(2 * pairs, device=seed.device, dtype=torch.long)
    uniform = _uniform(_splitmix(key[:, None] + counter[None, :] * _GAMMA))
    radius = torch.sqrt(-2.0 * torch.log(uniform[:, :pairs]))
    angle = (2.0 * math.pi) * uniform[:, pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, :size].float()


def keyed_uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One uniform number in (0, 1) per key, float64: what a sampler draws for one token. [N]"""
    return _uniform(_splitmix(_splitmix(_splitmix(seed.long()) ^ position.long()) ^ _MIX_1))
