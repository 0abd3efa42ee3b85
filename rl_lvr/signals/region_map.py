"""Attention of query rows on every single token of a region, chunked: rows x tokens x heads, never T x T."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rl_lvr.signals.region_scores import dtype_of, heads_of, region_scores


def region_map(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    width: int,
    rows: Tensor,
    lse: Tensor,
    *,
    scale: float,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    heads: Sequence[int] | None = None,
    by_head: bool = False,
) -> Tensor:
    """p_ij = exp(s_ij - lse_i), the attention of query i on token j of a region. It is not renormalised to 1.

    `columns` [B, T] int64 is the column of a token of the region, -1 for others. Tokens of different packed sequences
    may share a column, because a query sees those of its own alone. `lse` [N, H] is the log-sum-exp of each query's
    whole row under each of `heads`, sinks included. The other arguments are those of `region_scores`. Causal.
    Returns [N, width] fp32, the mean over heads, or with `by_head` [N, H, width]; 0 where a query sees no such token.
    """
    view = {"scale": scale, "segments": segments, "window": window, "softcap": softcap, "heads": heads}
    each = (len(heads_of(query, heads)),) if by_head else ()
    found = query.new_zeros(len(rows), *each, width, dtype=dtype_of(query))
    for part in region_scores(query, key, columns >= 0, rows, **view):  # type: ignore[arg-type]
        total = lse[part.places].t()[:, :, None].to(part.scores.dtype)
        p = part.scores.sub_(total).exp_().masked_fill_(~part.seen, 0.0)  # [H, n, m]
        share = p.transpose(0, 1) if by_head else p.mean(0)
        empty = share.new_zeros(*share.shape[:-1], width)
        found[part.places] = empty.index_add_(-1, columns[part.row, part.keys], share)
    return found
