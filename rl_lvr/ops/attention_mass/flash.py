"""The same mass out of any stock attention kernel: with one-hot values, its output *is* the mass of each region.

Forward and gradient are the library's own, in its precision: a cross-check for the kernels, and for models in bf16 the
cheapest gradient where all queries count. It cannot take soft caps or sinks, and computes every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lvr.ops.attention_mass.problem import Problem
from rl_lvr.ops.attention_mass.torch_chunked import one_hot


def attention_mass_flash(
    query: Tensor,
    key: Tensor,
    labels: Tensor,
    regions: int,
    *,
    scale: float,
    rows: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """`attention_mass` by scaled_dot_product_attention; arguments and result as there. [N,H,R] in the query's dtype."""
    _, count, _, width = query.shape
    if regions > width:
        raise ValueError(f"{regions} regions do not fit {width} value columns: ask in several calls.")
    chosen = list(range(count)) if heads is None else list(heads)
    problem = Problem(query, key, scale, rows, segments, window, None, tuple(chosen))
    problem.check()
    columns = one_hot(labels.flatten(), regions, query.dtype).unflatten(0, labels.shape)
    # Flash kernels want values as wide as keys.
    values = F.pad(columns, (0, width - regions))[:, None].expand(-1, key.shape[1], -1, -1)
    causal = segments is None and window is None and problem.offset == 0
    visible = None if causal else _visible(problem)
    empty = None if visible is None else ~visible.any(-1)
    if visible is not None and empty is not None:
        # A softmax over nothing is NaN in some kernels: such a row looks at one key, and is cleared afterwards.
        visible = visible | empty[..., None]
    out = F.scaled_dot_product_attention(
        query, key, values, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=problem.group > 1
    )[..., :regions]
    if empty is not None:
        out = out.masked_fill(empty[..., None], 0.0)
    return out[:, chosen].transpose(1, 2).flatten(0, 1)[problem.all_rows()]


def _visible(problem: Problem) -> Tensor:
    """[B,1,Tq,Tk]"""
    batch, _, queries, _ = problem.query.shape
    times = torch.arange(queries, device=problem.query.device)
    keys = torch.arange(problem.key.shape[2], device=problem.key.device)
    return torch.stack([problem.visible(b, times, keys) for b in range(batch)])[:, None]
