"""Entropy of attention within a region: the softmax over the region's visible keys alone, chunked, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rl_lvr.signals.region_scores import dtype_of, heads_of, region_scores


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

    Arguments are those of `region_scores`. Causal. Returns [N, H] fp32; 0 for a query that sees no such key.
    """
    view = {"scale": scale, "segments": segments, "window": window, "softcap": softcap, "heads": heads}
    entropy = query.new_zeros(len(rows), len(heads_of(query, heads)), dtype=dtype_of(query))
    for part in region_scores(query, key, region, rows, **view):  # type: ignore[arg-type]
        log_p = part.scores.log_softmax(-1)
        p = log_p.exp().masked_fill(~part.seen, 0.0)  # a query that sees nothing: all of its terms are 0
        entropy[part.places] = -(p * log_p).sum(-1).t()
    return entropy
