"""Plain PyTorch, any device: a few query rows of one key head at a time, so the T x T matrix never exists.

Path A (the log-sum-exp is given) is one small matrix product of the rows with the labelled keys. Path B (it is not)
reads the visible keys once. Products of bf16 numbers are taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rl_lvr.ops.attention_mass.problem import Problem

BLOCK_ELEMENTS = 1 << 20  # scores at a time: 4 MiB in float32, what a core's cache still holds


@dataclass(frozen=True)
class Group:
    """The rows asked for of one sequence, and heads: those that read one key head, or all."""

    sequence: int
    heads: list[int]  # increasing
    key_heads: list[int]  # one per head
    columns: list[int] | slice  # of the output, one per head
    start: int  # first row in the output
    times: Tensor  # [n] int64, increasing

    def blocks(self, width: int) -> Iterator[Block]:
        """Cut into pieces of one size whose scores, `width` numbers for each row, fit BLOCK_ELEMENTS."""
        pieces = -(-len(self.times) * max(1, width) // BLOCK_ELEMENTS)
        step = -(-len(self.times) // pieces)
        for low in range(0, len(self.times), step):
            times = self.times[low : low + step]
            first, last = times[[0, -1]].tolist()
            yield Block(self, slice(self.start + low, self.start + low + len(times)), times, first, last)


@dataclass(frozen=True)
class Block:
    """Rows of a group that are computed together."""

    group: Group
    places: slice  # rows of the output
    times: Tensor  # [n]
    first: int
    last: int

    def take(self, values: Tensor) -> Tensor:
        """This block's [g,n,...] of values [B,Hq,Tq,...]; a view where its heads and times are runs."""
        return values[self.group.sequence][_run(self.group.heads)][:, self._rows]

    def take_head(self, values: Tensor, head: int) -> Tensor:
        """[n,...], of one head."""
        return values[self.group.sequence, head][self._rows]

    @property
    def _rows(self) -> Tensor | slice:
        run = self.last - self.first + 1 == len(self.times)
        return slice(self.first, self.last + 1) if run else self.times

    def visible(self, problem: Problem, keys: Tensor) -> Tensor:
        return problem.visible(self.group.sequence, self.times, keys)


def _run(numbers: list[int]) -> list[int] | slice:
    """Increasing numbers as an index that makes a view, where they follow each other."""
    run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return slice(numbers[0], numbers[0] + len(numbers)) if run else numbers


def groups(problem: Problem, *, together: bool = False) -> Iterator[Group]:
    """By sequence and, unless `together`, by key head."""
    batch, queries = problem.query.shape[0], problem.query.shape[2]
    rows = problem.all_rows()
    if problem.rows is not None and not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError("rows have to be strictly increasing.")
    starts = torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device) * queries).tolist()
    if starts[0] != 0 or starts[-1] != len(rows):
        raise ValueError(f"rows {int(rows[0])} to {int(rows[-1])}, but there are {batch} x {queries} queries.")
    parts: dict[int, list[tuple[int, int]]] = {}
    for head, column in sorted((head, column) for column, head in enumerate(problem.heads)):
        parts.setdefault(0 if together else head // problem.group, []).append((head, column))
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        times = rows[start:stop] - sequence * queries
        for chosen in parts.values():
            if stop > start:
                heads = [head for head, _ in chosen]
                key_heads = [head // problem.group for head in heads]
                yield Group(sequence, heads, key_heads, _run([column for _, column in chosen]), start, times)


def key_range(problem: Problem, block: Block) -> Tensor:
    """Positions from the first to the last key that any query of the block may see. [m] int64"""
    stop = block.last + problem.offset + 1
    start = 0 if problem.window is None else max(0, block.first + problem.offset - problem.window + 1)
    return torch.arange(start, stop, device=problem.key.device)


def block_scores(problem: Problem, queries: Tensor, keys: Tensor) -> Tensor:
    """queries [g,n,d], keys [m,d] -> s [g,n,m] after the soft cap, not masked."""
    return capped(problem, torch.matmul(queries, keys.transpose(0, 1)).mul_(problem.scale))


def capped(problem: Problem, s: Tensor) -> Tensor:
    """The soft cap, in place."""
    return s if problem.softcap is None else s.div_(problem.softcap).tanh_().mul_(problem.softcap)


def one_hot(labels: Tensor, regions: int, dtype: torch.dtype) -> Tensor:
    """[m] -> [m,R]; a row of zeros for a key of no region."""
    return (labels[:, None] == torch.arange(regions, device=labels.device)).to(dtype)


@dataclass(frozen=True)
class Softmax:
    """Of a block. Sums leave the largest term out and so stay accurate when it is nearly all (as in vocab_stats)."""

    scores: Tensor  # [g,n,m] less the row's largest; 0 where masked
    weights: Tensor  # [g,n,m]
    lse: Tensor  # [g,n], -inf where no key is visible
    entropy: Tensor  # [g,n], 0 where no key is visible

    @classmethod
    def of(cls, s: Tensor, visible: Tensor, sink: Tensor | None = None) -> Softmax:
        """s [g,n,m] is overwritten; visible [n,m]; sink [g], a logit that takes its share of the weights."""
        seen = visible.any(-1)
        top, place = s.masked_fill_(~visible, -math.inf).max(-1, keepdim=True)
        s.sub_(top.masked_fill(~seen[:, None], 0.0))
        weights = s.exp()
        rest = weights.scatter(-1, place, 0.0).sum(-1)
        s.masked_fill_(~visible, 0.0)
        entropy = torch.log1p(rest) - (s * weights).sum(-1) / (1 + rest)
        lse = (top[..., 0] + torch.log1p(rest)).masked_fill(~seen, -math.inf)
        weights.div_(1 + rest[..., None])
        if sink is not None:
            total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
            weights.mul_(torch.exp(lse - total)[..., None])
            lse = total
        return cls(s, weights, lse, entropy.masked_fill(~seen, 0.0))


def mass(
    problem: Problem, labels: Tensor, regions: int, positions: Tensor | None, lse: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """[N,H,R]. lse [B,Hq,Tq] with positions [B,S] (`labelled_positions`): path A; both None: path B."""
    out = torch.zeros(problem.size, len(problem.heads), regions, dtype=problem.dtype, device=problem.query.device)
    given = lse is not None and positions is not None
    for group in groups(problem, together=given):
        if lse is not None and positions is not None:
            parts = _path_a(problem, group, labels, regions, positions, lse)
        else:
            parts = _path_b(problem, group, labels, regions, sinks)
        for block, share in parts:
            out[block.places, group.columns] = share.transpose(0, 1)
    return out


def _path_a(
    problem: Problem, group: Group, labels: Tensor, regions: int, positions: Tensor, lse: Tensor
) -> Iterator[tuple[Block, Tensor]]:
    at = positions[group.sequence]
    at = at[at >= 0].long()
    if not len(at):
        return
    # The scale goes onto the few keys, not onto the many scores.
    keys = {
        head: problem.key[group.sequence, head, at].to(problem.dtype).mul_(problem.scale).transpose(0, 1)
        for head in dict.fromkeys(group.key_heads)
    }
    columns = one_hot(labels[group.sequence, at], regions, problem.dtype)
    masked = problem.window is not None or problem.segments is not None
    last = int(at[-1])
    for block in group.blocks(max(len(at), problem.key.shape[3])):
        hidden = ~block.visible(problem, at) if masked or last > block.first + problem.offset else None
        share = columns.new_empty(len(group.heads), len(block.times), regions)
        scores = columns.new_empty(len(block.times), len(at))  # of one head after another: they stay in the cache
        for i, (head, key_head) in enumerate(zip(group.heads, group.key_heads, strict=True)):
            queries = block.take_head(problem.query, head).to(problem.dtype)
            p = capped(problem, torch.mm(queries, keys[key_head], out=scores))
            p.sub_(block.take_head(lse, head)[:, None]).exp_()
            if hidden is not None:
                p.masked_fill_(hidden, 0.0)
            torch.mm(p, columns, out=share[i])
        yield block, share


def _path_b(
    problem: Problem, group: Group, labels: Tensor, regions: int, sinks: Tensor | None
) -> Iterator[tuple[Block, Tensor]]:
    for block in group.blocks(problem.key.shape[2] * len(group.heads)):
        soft, keys = _softmax(problem, block, sinks)
        yield block, soft.weights @ one_hot(labels[group.sequence, keys], regions, problem.dtype)


def _softmax(problem: Problem, block: Block, sinks: Tensor | None = None) -> tuple[Softmax, Tensor]:
    keys = key_range(problem, block)
    group = block.group
    values = problem.key[group.sequence, group.key_heads[0], keys].to(problem.dtype)
    s = block_scores(problem, block.take(problem.query).to(problem.dtype), values)
    sink = None if sinks is None else sinks[group.heads]
    return Softmax.of(s, block.visible(problem, keys), sink), keys


def statistics(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy (nats), both [N,H]; a row without keys has -inf and 0."""
    shape = problem.size, len(problem.heads)
    lse = torch.full(shape, -math.inf, dtype=problem.dtype, device=problem.query.device)
    entropy = torch.zeros_like(lse)
    for group in groups(problem):
        for block in group.blocks(problem.key.shape[2] * len(group.heads)):
            soft, _ = _softmax(problem, block)
            lse[block.places, group.columns] = soft.lse.transpose(0, 1)
            entropy[block.places, group.columns] = soft.entropy.transpose(0, 1)
    return lse, entropy


@dataclass(frozen=True)
class Upstream:
    """dL/d(result), None for a result that was not asked for. mass [N,H,R], lse and entropy [N,H]."""

    mass: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None


def gradients(
    problem: Problem, upstream: Upstream, labels: Tensor | None, lse: Tensor | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dL/dquery and dL/dkey, in closed form (dense over all visible keys).

    dm_i(R)/ds_ij = p_ij (1[j in R] - m_i(R)), dlse_i/ds_ij = p_ij, dH_i/ds_ij = p_ij (E_i[s] - s_ij). A log-sum-exp
    that was given is a function of query and key like one that was not: only it gets no gradient of its own.
    """
    d_query = torch.zeros_like(problem.query)
    d_key = torch.zeros_like(problem.key, dtype=problem.dtype)
    for group in groups(problem):
        for block in group.blocks(problem.key.shape[2] * len(group.heads)):
            _block_gradients(problem, block, upstream, labels, lse, sinks, d_query, d_key)
    return d_query, d_key.to(problem.key.dtype)


def _block_gradients(
    problem: Problem,
    block: Block,
    upstream: Upstream,
    labels: Tensor | None,
    lse: Tensor | None,
    sinks: Tensor | None,
    d_query: Tensor,
    d_key: Tensor,
) -> None:
    group = block.group
    keys = key_range(problem, block)
    visible = block.visible(problem, keys)
    # What nobody sees may hold NaN, and 0 * NaN is NaN.
    values = (
        problem.key[group.sequence, group.key_heads[0], keys].to(problem.dtype).masked_fill(~visible.any(0)[:, None], 0)
    )
    queries = block.take(problem.query).to(problem.dtype).masked_fill(~visible.any(1)[:, None], 0)
    s = block_scores(problem, queries, values)
    slope = None if problem.softcap is None else 1 - (s / problem.softcap).square()
    if lse is None:
        soft = Softmax.of(s, visible, None if sinks is None else sinks[group.heads])
        p, s = soft.weights, soft.scores
    else:
        p = s.sub(block.take(lse)[..., None]).exp_().masked_fill_(~visible, 0.0)
    d_s = torch.zeros_like(p)
    if upstream.mass is not None and labels is not None:
        of_region = one_hot(labels[group.sequence, keys], upstream.mass.shape[-1], problem.dtype)
        force = _take(upstream.mass, block, problem.dtype) @ of_region.transpose(0, 1)
        d_s += p * (force - (p * force).sum(-1, keepdim=True))
    if upstream.lse is not None:
        d_s += p * _take(upstream.lse, block, problem.dtype)[..., None]
    if upstream.entropy is not None:
        mean = (p * s).sum(-1, keepdim=True)
        d_s += p * (mean - s) * _take(upstream.entropy, block, problem.dtype)[..., None]
    d_s *= problem.scale
    if slope is not None:
        d_s *= slope
    for i, head in enumerate(group.heads):
        d_query[group.sequence, head, block.times] = (d_s[i] @ values).to(d_query.dtype)
    d_key[group.sequence, group.key_heads[0], keys] += torch.einsum("gnm,gnd->md", d_s, queries)


def _take(values: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's part of an output-shaped tensor [N,H,...] -> [g,n,...]."""
    return values[block.places, block.group.columns].transpose(0, 1).to(dtype)
