"""Chooses blocks and launches the kernels of triton_kernels.py. Nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from rl_lvr.ops import backends
from rl_lvr.ops.attention_mass import triton_kernels as kernels
from rl_lvr.ops.attention_mass.problem import Problem

MAX_REGIONS = 64


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of one launch."""

    queries: int
    keys: int
    warps: int
    stages: int


def path_a_blocks(dtype: torch.dtype, head_dim: int, labelled: int) -> Blocks:
    """Bound by reading the queries: small programs, several to a multiprocessor, one stage."""
    if dtype == torch.float32:
        return Blocks(16, 16, 8, 1)  # with 4 warps and eight regions registers spill
    return Blocks(64 if head_dim <= 128 else 32, 16 if labelled <= 16 else 32, 4, 1)


def path_b_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """Bound by the product and the exponentials: many queries per key that is read, the next keys on their way."""
    if dtype == torch.float32:
        return Blocks(32, 32, 4, 1)
    return Blocks(128, 64, 8, 2) if head_dim <= 128 else Blocks(64, 32, 4, 1)


def statistics_blocks(dtype: torch.dtype, head_dim: int) -> Blocks:
    """As path B with half the queries: each score also takes part in the sums without the largest one."""
    if dtype == torch.float32:
        return Blocks(32, 16, 4, 1)
    return Blocks(64, 64, 8, 2) if head_dim <= 128 else Blocks(64, 32, 4, 1)


@dataclass(frozen=True)
class Heads:
    """Selected heads sorted by their key head. starts [groups+1], heads [H], columns [H], as int32 on the device."""

    starts: Tensor
    heads: Tensor
    columns: Tensor
    in_order: Tensor  # [H], as asked for

    @property
    def groups(self) -> int:
        return self.starts.shape[0] - 1


@lru_cache(maxsize=64)
def head_table(heads: tuple[int, ...], group: int, device: torch.device) -> Heads:
    """Small copies to the device that wait for it: kept from the first layer on."""
    order = sorted(range(len(heads)), key=lambda column: heads[column])
    key_heads = [heads[column] // group for column in order]
    starts = [i for i, k in enumerate(key_heads) if i == 0 or k != key_heads[i - 1]] + [len(heads)]
    numbers = starts, [heads[column] for column in order], order, list(heads)
    return Heads(*(torch.tensor(n, dtype=torch.int32, device=device) for n in numbers))


def common_flags(problem: Problem, blocks: Blocks) -> dict[str, Any]:
    head_dim = problem.query.shape[3]
    return {
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_Q": blocks.queries,
        "BLOCK_K": blocks.keys,
        "HAS_ROWS": problem.rows is not None,
        "HAS_SEGMENTS": problem.segments is not None,
        "HAS_WINDOW": problem.window is not None,
        "HAS_SOFTCAP": problem.softcap is not None,
        "UPCAST": problem.query.dtype == torch.bfloat16 and backends.interpreted(),
        "PRECISION": "ieee",  # of a float32 product; bf16 and fp16 ones are exact
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def common_numbers(problem: Problem) -> Mapping[str, Any]:
    return {
        "size": problem.size,
        "queries": problem.query.shape[2],
        "keys": problem.key.shape[2],
        "count": len(problem.heads),
        "group": problem.group,
        "window": 0 if problem.window is None else problem.window,
        "scale": float(problem.scale),
        "softcap": 1.0 if problem.softcap is None else float(problem.softcap),
    }


def strides(problem: Problem) -> tuple[int, ...]:
    return *problem.query.stride(), *problem.key.stride()


def region_block(regions: int) -> int:
    if regions > MAX_REGIONS:
        raise ValueError(f"{regions} regions, but backend triton takes {MAX_REGIONS}: ask in several calls.")
    return triton.next_power_of_2(regions)


def mass(
    problem: Problem, labels: Tensor, regions: int, positions: Tensor | None, lse: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """[N,H,R] float32. Path A if lse and positions are given."""
    out = torch.empty(problem.size, len(problem.heads), regions, device=problem.query.device)
    if not problem.size:
        return out
    if lse is not None and positions is not None:
        path_a(problem, labels, regions, positions, lse, out, None, None)
        return out
    blocks = path_b_blocks(problem.query.dtype, problem.query.shape[3])
    table = head_table(problem.heads, problem.group, problem.query.device)
    kernels.mass_one_pass[(triton.cdiv(problem.size, blocks.queries), len(problem.heads))](
        problem.query.detach(), problem.key.detach(), labels.contiguous(), problem.rows,
        contiguous(problem.segments), sinks, table.in_order, out,
        *strides(problem), **common_numbers(problem), regions=regions,
        BLOCK_R=region_block(regions), HAS_SINKS=sinks is not None, **common_flags(problem, blocks),
    )  # fmt: skip
    return out


def contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def path_a(
    problem: Problem, labels: Tensor, regions: int, positions: Tensor, lse: Tensor, out: Tensor,
    weights: Tensor | None, per_head: Tensor | None,
) -> Blocks:  # fmt: skip
    """Fills out, and per_head where weights are given."""
    blocks = path_a_blocks(problem.query.dtype, problem.query.shape[3], positions.shape[1])
    table = head_table(problem.heads, problem.group, problem.query.device)
    kernels.mass_given_lse[(triton.cdiv(problem.size, blocks.queries), table.groups)](
        problem.query.detach(), problem.key.detach(), labels.contiguous(), positions.contiguous(), lse, problem.rows,
        contiguous(problem.segments), weights, table.starts, table.heads, table.columns, out, per_head,
        *strides(problem), *lse.stride(), **common_numbers(problem), width=positions.shape[1], regions=regions,
        BLOCK_R=region_block(regions), REDUCE=weights is not None, **common_flags(problem, blocks),
    )  # fmt: skip
    return blocks


def reduced(
    problem: Problem, labels: Tensor, regions: int, weights: Tensor, positions: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Path A with both sums taken in the kernel: mean over heads [N,R], weighted sum over queries [B,H,R], float32."""
    batch, _, queries, _ = problem.query.shape
    device, count = problem.query.device, len(problem.heads)
    bounds = torch.arange(batch + 1, device=device) * queries
    if problem.rows is not None:
        increasing = (problem.rows[1:] > problem.rows[:-1]).all()
        torch._assert_async(increasing, "rl_lvr::attention_mass_reduced: rows have to be strictly increasing")
        bounds = torch.searchsorted(problem.rows, bounds)
    blocks = path_a_blocks(problem.query.dtype, problem.query.shape[3], positions.shape[1])
    tiles = triton.cdiv(problem.size, blocks.queries)
    groups = head_table(problem.heads, problem.group, device).groups
    per_query = torch.empty(groups, problem.size, regions, device=device)
    entries = torch.zeros(tiles + batch, count, regions, device=device)
    per_head = torch.empty(batch, count, regions, device=device)
    if problem.size:
        path_a(problem, labels, regions, positions, lse, per_query, weights.float().contiguous(), entries)
    kernels.sum_entries[(batch, count)](
        entries, bounds, per_head, count, regions,
        BLOCK_Q=blocks.queries, BLOCK_S=32, BLOCK_R=region_block(regions),
    )  # fmt: skip
    return per_query.sum(0) / count, per_head


def statistics(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy (nats), both [N,H] float32; a row without keys has -inf and 0."""
    shape = problem.size, len(problem.heads)
    top, rest, below = (torch.empty(shape, device=problem.query.device) for _ in range(3))
    if not problem.size:
        return top, rest
    blocks = statistics_blocks(problem.query.dtype, problem.query.shape[3])
    table = head_table(problem.heads, problem.group, problem.query.device)
    kernels.statistics_one_pass[(triton.cdiv(problem.size, blocks.queries), len(problem.heads))](
        problem.query.detach(), problem.key.detach(), problem.rows, contiguous(problem.segments), table.in_order,
        top, rest, below, *strides(problem), **common_numbers(problem), **common_flags(problem, blocks),
    )  # fmt: skip
    seen = ~(rest <= -1.0)  # NaN counts as seen
    log_rest = torch.log1p(rest.masked_fill(~seen, 0.0))
    entropy = log_rest - math.log(2.0) * below / (1.0 + rest)
    return (top * math.log(2.0) + log_rest).masked_fill(~seen, -math.inf), entropy.masked_fill(~seen, 0.0)
