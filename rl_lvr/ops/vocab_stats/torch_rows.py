"""One slice of logits in plain torch, on any device: folded into the statistics, or turned into their gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats.gradient import Coefficients
from rl_lvr.ops.vocab_stats.partial import EMPTY, FLOOR, Partial, merge, stack_rows
from rl_lvr.ops.vocab_stats.sweep import Slice

BLOCK_ELEMENTS = 1 << 20
"""Temporaries stay in a cache of some megabytes."""


def fold(part: Partial, piece: Slice, chosen: Tensor | None, next_row: Tensor | None) -> Partial:
    """`part` and the statistics of `piece`; see `sweep.Fold`."""
    rows = len(piece.logits)
    blocks = []
    for block in _blocks(piece.logits):
        picked = None if chosen is None else chosen[block]
        following = None
        if next_row is not None:
            after = torch.arange(block.start + 1, block.stop + 1, device=piece.logits.device).clamp(max=rows - 1)
            following = _scaled(piece.logits[after], piece)
        blocks.append(_statistics(_scaled(piece.logits[block], piece), piece.start, part, picked, following))
    return merge(part, stack_rows(blocks)) if blocks else part


def differentiate(piece: Slice, c: Coefficients, out: Tensor) -> None:
    """Writes dL/dlogits; see `sweep.Differentiate`."""
    width = piece.logits.shape[1]
    for block in _blocks(piece.logits):
        y = _shifted(_scaled(piece.logits[block], piece), c.maximum[block, None])
        e = y.exp()
        bracket = c.entropy[block, None] * (c.mean[block, None] - y)
        bracket += c.renyi[block, None] * (1 - c.ratio[block, None] * e)
        bracket += c.linear[block, None]
        gradient = e.mul_(c.inverse[block, None]).mul_(bracket)
        chosen = c.chosen[block, None] - piece.start
        top_ids = c.top_ids[block] - piece.start
        _add_at(gradient, chosen, _inside(chosen, width) * c.chosen_weight[block, None])
        _add_at(gradient, top_ids, _inside(top_ids, width) * c.top_weight[block, None])
        argmax = c.argmax[block, None] - piece.start
        at = argmax.clamp(0, width - 1)
        gradient.scatter_(1, at, torch.where(_inside(argmax, width), c.at_top[block, None], gradient.gather(1, at)))
        out[block] = gradient


def _statistics(z: Tensor, start: int, like: Partial, chosen: Tensor | None, following: Tensor | None) -> Partial:
    """Of the logits `z` [R, C] of ids `start` and following; `following` [R, C] are those of each next row."""
    width = z.shape[1]
    maximum, argmax = z.max(1)
    maximum = maximum.clamp(min=EMPTY)
    y = _shifted(z, maximum[:, None])
    e = y.exp().scatter_(1, argmax[:, None], 0.0)
    nothing = maximum == EMPTY
    picked = torch.full_like(maximum, -torch.inf)
    if chosen is not None:
        local = chosen[:, None] - start
        values = z.gather(1, local.clamp(0, width - 1))
        picked = torch.where(_inside(local, width), values, -torch.inf)[:, 0]
    next_maximum, cross = torch.full_like(maximum, EMPTY), torch.zeros_like(maximum)
    if following is not None:
        next_maximum = following.amax(1).clamp(min=EMPTY)
        apart = following - next_maximum[:, None]
        weighted = torch.where(e > 0, e * apart, torch.zeros_like(e)).sum(1)
        cross = torch.where(nothing, cross, weighted + apart.gather(1, argmax[:, None])[:, 0])
    top_values, top_ids = z.topk(min(like.top_values.shape[1], width), dim=1)
    return Partial(
        maximum=maximum,
        argmax=argmax + start,
        rest=torch.where(nothing, -1.0, e.sum(1)),
        moment=(e * y).sum(1),
        square=torch.where(nothing, -1.0, (e * e).sum(1)),
        top_values=top_values,
        top_ids=top_ids + start,
        chosen=picked,
        next_maximum=next_maximum,
        cross=cross,
    )


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for top in range(0, rows, step):
        yield slice(top, min(top + step, rows))


def _scaled(logits: Tensor, piece: Slice) -> Tensor:
    if piece.bias is not None:
        logits = logits + piece.bias
    return logits if piece.temperature == 1.0 else logits / piece.temperature


def _shifted(z: Tensor, maximum: Tensor) -> Tensor:
    """z - maximum, finite for banned ids at -inf."""
    return (z - maximum).clamp_(min=FLOOR)


def _inside(local: Tensor, width: int) -> Tensor:
    return (local >= 0) & (local < width)


def _add_at(gradient: Tensor, local: Tensor, amount: Tensor) -> None:
    gradient.scatter_add_(1, local.clamp(0, gradient.shape[1] - 1), amount.to(gradient.dtype))
