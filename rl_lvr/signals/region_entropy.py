"""Entropy of attention within a region: the softmax over the region's visible keys alone, chunked, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 4 << 20  # scores held at a time


def region_entropy(
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
) -> Tensor:
    """H_i = -sum_j p_ij log p_ij in nats, p_i the softmax of query i over the keys of `region` that it sees.

    query [B, Hq, T, d], key [B, Hkv, T, d], region [B, T] bool, rows [N] flat indices b*T + t in increasing order,
    segments [B, T] (-1 is padding). Causal. Returns [N, H] fp32; 0 for a query that sees no such key.
    """
    tokens, chosen = query.shape[2], list(range(query.shape[1])) if heads is None else list(heads)
    kv_heads = [head // (query.shape[1] // key.shape[1]) for head in chosen]
    entropy = query.new_zeros(len(rows), len(chosen), dtype=torch.float32)
    row_of, time_of = rows // tokens, rows % tokens
    for b in row_of.unique().tolist():
        places = region[b].nonzero()[:, 0]
        mine = (row_of == b).nonzero()[:, 0]
        if not len(places):
            continue
        keys = key[b, kv_heads][:, places].float()  # [H, m, d]
        for part in mine.split(max(1, CHUNK // (len(places) * len(chosen)))):
            times = time_of[part]
            scores = scale * query[b, chosen][:, times].float() @ keys.transpose(1, 2)  # [H, n, m]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            seen = places <= times[:, None]
            if window is not None:
                seen &= places > times[:, None] - window
            if segments is not None:
                seen &= segments[b, places] == segments[b, times][:, None]
            scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
            log_p = scores.log_softmax(-1)
            p = log_p.exp().masked_fill(~seen, 0.0)  # a query that sees nothing: all of its terms are 0
            entropy[part] = -(p * log_p).sum(-1).t()
    return entropy
