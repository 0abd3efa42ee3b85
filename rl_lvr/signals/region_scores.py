"""Attention scores of query rows on the keys of a region, in chunks: what the entropy and the map of a region share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 4 << 20  # scores held at a time


@dataclass(frozen=True)
class Part:
    """Scores of some query rows of one batch row."""

    places: Tensor
    """[n] int64, indices into `rows`."""
    row: int
    """Row of the batch."""
    keys: Tensor
    """[m] int64, places of the region's tokens in that row."""
    scores: Tensor
    """[H, n, m] fp32 (float64 for float64 queries), the smallest number of that type where a query does not see a key.
    The receiver may overwrite it."""
    seen: Tensor
    """[n, m] bool."""


def region_scores(
    query: Tensor,
    key: Tensor,
    region: Tensor,
    rows: Tensor,
    *,
    scale: float,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[Part]:
    """Yield the scores of all query rows whose batch row has a token of `region`, at most CHUNK scores at a time.

    Args:
        query: [B, Hq, T, d], after RoPE.
        key: [B, Hkv, T, d]; query head h reads key head h // (Hq / Hkv).
        region: [B, T] bool.
        rows: [N] flat indices b*T + t, increasing.
        scale: Factor on the scores.
        segments: [B, T], the packed sequence of each token, -1 at padding.
        window: Number of keys that a query sees, its own token included.
        softcap: s becomes c * tanh(s / c).
        heads: Query heads, in the order of the result; None for all.
    """
    tokens, chosen = query.shape[2], heads_of(query, heads)
    kv_heads = [head // (query.shape[1] // key.shape[1]) for head in chosen]
    row_of, time_of, dtype = rows // tokens, rows % tokens, dtype_of(query)
    for b in row_of.unique().tolist():
        keys = region[b].nonzero()[:, 0]
        mine = (row_of == b).nonzero()[:, 0]
        if not len(keys):
            continue
        vectors = key[b, kv_heads][:, keys].to(dtype)  # [H, m, d]
        for places in mine.split(max(1, CHUNK // (len(keys) * len(chosen)))):
            times = time_of[places]
            scores = scale * query[b, chosen][:, times].to(dtype) @ vectors.transpose(1, 2)  # [H, n, m]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seen = keys <= times[:, None]
            if window is not None:
                seen &= keys > times[:, None] - window
            if segments is not None:
                seen &= segments[b, keys] == segments[b, times][:, None]
            yield Part(places, b, keys, scores.masked_fill(~seen, torch.finfo(dtype).min), seen)


def heads_of(query: Tensor, heads: Sequence[int] | None) -> list[int]:
    """`heads` of `query` [B, Hq, T, d], spelled out."""
    return list(range(query.shape[1])) if heads is None else list(heads)


def dtype_of(query: Tensor) -> torch.dtype:
    """Of the arithmetic and of the results."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
