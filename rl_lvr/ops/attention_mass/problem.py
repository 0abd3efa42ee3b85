"""What every backend is given: the queries, the keys, and which key a query sees. Nothing is computed here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call, checked by `check`.

    query [B,Hq,Tq,d] and key [B,Hkv,Tk,d] after RoPE, any strides; query head h reads key head h // (Hq / Hkv).
    rows [N] int64, strictly increasing: b*Tq + t of the query rows asked for; None: all of them.
    segments [B,Tk] int: the packed sequence of a token, -1 for padding; None: one sequence without padding.
    heads: the query heads asked for, in the order of the output's columns.
    """

    query: Tensor
    key: Tensor
    scale: float
    rows: Tensor | None
    segments: Tensor | None
    window: int | None
    softcap: float | None
    heads: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Query t is the token at key position t + offset."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def size(self) -> int:
        """N, the number of query rows asked for."""
        return self.query.shape[0] * self.query.shape[2] if self.rows is None else self.rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic and of the results: float64 stays, everything else is computed in float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def all_rows(self) -> Tensor:
        """`rows`, spelled out. [N] int64"""
        if self.rows is not None:
            return self.rows.long()
        return torch.arange(self.size, device=self.query.device)

    def visible(self, sequence: int, times: Tensor, keys: Tensor) -> Tensor:
        """Whether the queries at `times` [n] see the keys at positions `keys` [m], in one sequence. [n,m] bool"""
        here = times[:, None] + self.offset
        seen = keys <= here
        if self.window is not None:
            seen &= keys > here - self.window
        if self.segments is not None:
            segments = self.segments[sequence]
            own = segments[here]
            seen &= (segments[keys] == own) & (own >= 0)
        return seen

    def check(self) -> None:
        """ValueError where shapes do not fit together."""
        query, key = self.query, self.key
        if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)} are not [B,Hq,Tq,d] and [B,Hkv,Tk,d]."
            )
        if query.shape[1] % key.shape[1] or query.shape[2] > key.shape[2]:
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)}: key heads have to divide the query heads, "
                "and there are at least as many keys as queries."
            )
        if query.dtype != key.dtype:
            raise ValueError(f"query is {query.dtype} but key is {key.dtype}.")
        if self.rows is not None and self.rows.dim() != 1:
            raise ValueError(f"rows are flat indices b*Tq + t, not of shape {tuple(self.rows.shape)}.")
        if self.segments is not None and self.segments.shape != (key.shape[0], key.shape[2]):
            raise ValueError(f"segments {tuple(self.segments.shape)} are not [B,Tk] of key {tuple(key.shape)}.")
        if not self.heads or not all(0 <= head < query.shape[1] for head in self.heads):
            raise ValueError(f"heads {list(self.heads)} of a layer that has 0 to {query.shape[1] - 1}.")
        if len(set(self.heads)) != len(self.heads):
            raise ValueError(f"a head is asked for twice in {list(self.heads)}.")


def labelled_positions(labels: Tensor) -> Tensor:
    """Positions of the keys with a label, in order, filled up with -1. labels [B,Tk] -> [B,S] int32.

    S is the largest number of labelled keys in a sequence: on CUDA this waits for the device, so make it once per
    batch and give it to every layer.
    """
    labelled = labels >= 0
    counts = labelled.sum(1)
    width = int(counts.max()) if labels.numel() else 0
    order = torch.argsort((~labelled).to(torch.uint8), dim=1, stable=True)[:, :width]
    absent = torch.arange(width, device=labels.device) >= counts[:, None]
    return order.masked_fill(absent, -1).to(torch.int32)
