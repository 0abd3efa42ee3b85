"""Gumbel noise per token, keyed by (request seed, position, token id): the numbers of vLLM's sampler, in torch.

The word behind each number is MurmurHash3 (x86, 32 bit; Appleby 2011) of the key's four 32-bit words. Uniform numbers
are vLLM's bit for bit. Their logarithms differ between libraries in the last bit, as logits do between engines.
"""

from __future__ import annotations

import torch
from torch import Tensor

# As signed 32-bit numbers: torch's int32 multiplication wraps around.
_C1 = 0xCC9E2D51 - 2**32
_C2 = 0x1B873593
_ADD = 0xE6546B64 - 2**32
_F1 = 0x85EBCA6B - 2**32
_F2 = 0xC2B2AE35 - 2**32
_BYTES = 16
_CHUNK = 1 << 21
"""Numbers made at a time, so that a whole vocabulary times a batch needs no temporaries of its size."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _rotate(x: Tensor, bits: int) -> Tensor:
    return (x << bits) | _shift_right(x, 32 - bits)


def _mix(state: Tensor, word: Tensor) -> Tensor:
    state = state ^ (_rotate(word * _C1, 15) * _C2)
    return _rotate(state, 13) * 5 + _ADD


def _finish(state: Tensor) -> Tensor:
    state = state ^ _BYTES
    state = (state ^ _shift_right(state, 16)) * _F1
    state = (state ^ _shift_right(state, 13)) * _F2
    return state ^ _shift_right(state, 16)


def _words(seeds: Tensor, positions: Tensor) -> Tensor:
    """The hash's state before the token is mixed in. int64 [B] -> int32 [B]"""
    state = torch.zeros_like(seeds, dtype=torch.int32)
    for word in (seeds, seeds >> 32, positions):
        state = _mix(state, word.to(torch.int32))
    return state


def uniform(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """float32 [B, T] in (0, 1] for seeds and positions [B] and token ids [T], all int64."""
    word = _finish(_mix(_words(seeds, positions)[:, None], tokens.to(torch.int32)[None, :]))
    # (word + 1/2) / 2^32, rounded once: both halves are exact in float32, and small numbers keep all their bits.
    high, low = _shift_right(word, 16), word & 0xFFFF
    return high.float() * 2.0**-16 + (low.float() + 0.5) * 2.0**-32


def _exponential(u: Tensor) -> Tensor:
    """-log(1 - u) as vLLM computes it: below 1/4 by eight terms of the series, whose error (6e-7) shows in draws."""
    series = torch.full_like(u, 1 / 8)
    for power in range(7, 0, -1):
        series.mul_(u).add_(1 / power)
    return torch.where(u < 0.25, series.mul_(u), (1 - u).clamp_(min=2.0**-24).log_().neg_())


def gumbel(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [B, T]; `positions` are of the token before the one that is drawn."""
    return _exponential(uniform(seeds, positions, tokens)).log_().neg_()


def noised_argmax(logits: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """argmax of logits [B, V] plus their noise: a draw from softmax(logits). Token ids [B]."""
    best = torch.full_like(logits[:, 0], float("-inf"))
    index = torch.zeros_like(seeds)
    width = max(1, _CHUNK // len(logits))
    for start in range(0, logits.shape[1], width):
        part = logits[:, start : start + width]
        tokens = torch.arange(start, start + part.shape[1], device=logits.device)
        most, where = (part + gumbel(seeds, positions, tokens)).max(-1)
        better = most > best
        best, index = torch.where(better, most, best), torch.where(better, where + start, index)
    return index
