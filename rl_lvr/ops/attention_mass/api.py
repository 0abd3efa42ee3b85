"""The public functions: typed signatures over the operators of `operators`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lvr.ops.attention_mass import operators


@dataclass(frozen=True)
class Reduced:
    """Masses summed up: per_query [N,R] is the mean over the selected heads, per_head [B,H,R] the weighted sum over the
    queries of each sequence."""

    per_query: Tensor
    per_head: Tensor


def attention_mass(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    regions: int,
    *,
    scale: float,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """How much attention each query pays to each region: m_i(r) = sum of softmax(s_i)_j over keys j with label r.

    query [B,Hq,Tq,d] and key [B,Hkv,Tk,d]: after RoPE, any strides. labels [B,Tk] int: the region 0 to R-1 of a key,
    negative: attended to, but in no region.
    lse [B,Hq,Tq] float32: log-sum-exp (natural log) of the whole row, which attention kernels return. With it (path A)
    only labelled keys are read, without it (path B) all visible ones. It already holds sinks, if there are any.
    rows [N]: strictly increasing flat indices b*Tq + t, None for all. positions [B,S]: `labelled_positions(labels)`,
    made once per batch. segments [B,Tk]: packed sequence of each token, -1 for padding.
    window: keys less than so many places back. softcap: s becomes c*tanh(s/c). sinks [Hq]: one more logit per head.
    Attention is causal; query t is the token at t + Tk - Tq. heads: None for all, else the output's columns.
    Returns [N,H,R] float32 (float64 for float64 queries); a row that sees no key has zeros. Differentiable with
    respect to query and key, in full: a given lse counts as a function of them. lse and sinks get no gradient.
    """
    _check_regions(query, key, labels, regions, lse, sinks)
    view = (scale, rows, segments, window, softcap, _list(heads), backend)
    return operators.mass(query, key, labels, regions, lse, positions, sinks, *view)


def attention_mass_reduced(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    regions: int,
    *,
    weights: Tensor,
    scale: float,
    lse: Tensor | None = None,
    rows: Tensor | None = None,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
) -> Reduced:
    """`attention_mass`, summed up on the way (path A never stores [N,H,R]). weights [N] float32, without gradient."""
    _check_regions(query, key, labels, regions, lse, sinks)
    view = (scale, rows, segments, window, softcap, _list(heads), backend)
    return Reduced(*operators.reduced(query, key, labels, regions, weights, lse, positions, sinks, *view))


def attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Entropy -sum p log p of attention over the visible keys, in nats. [N,H] float32, 0 where no key is visible."""
    return operators.statistics(query, key, scale, rows, segments, window, softcap, _list(heads), backend)[1]


def log_sum_exp(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    rows: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Natural log of the softmax's denominator. [N,H] float32; -inf where there is neither a visible key nor a sink."""
    lse = operators.statistics(query, key, scale, rows, segments, window, softcap, _list(heads), backend)[0]
    if sinks is None:
        return lse
    return torch.logaddexp(lse, (sinks if heads is None else sinks[list(heads)]).to(lse.dtype))


def _list(heads: Sequence[int] | None) -> list[int] | None:
    return None if heads is None else [int(head) for head in heads]


def _check_regions(
    query: Tensor, key: Tensor, labels: Tensor, regions: int, lse: Tensor | None, sinks: Tensor | None
) -> None:
    if labels.shape != (key.shape[0], key.shape[2]) or labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype} are not integers [B,Tk] of key {tuple(key.shape)}."
        )
    if regions < 1:
        raise ValueError(f"{regions} regions: there has to be one at least.")
    if lse is not None and lse.shape != query.shape[:3]:
        raise ValueError(f"lse {tuple(lse.shape)} is not [B,Hq,Tq] of query {tuple(query.shape)}.")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks.shape)} are not [Hq] of query {tuple(query.shape)}.")
    if lse is not None and sinks is not None:
        raise ValueError("a given lse already holds the sinks: pass one of the two.")
