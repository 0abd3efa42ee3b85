"""The definition, spelled out: the whole T x T matrix in float64. Slow on purpose; every other backend answers to it.

m_i(R) = sum of softmax(s_i)_j over the keys j of region R, s_ij = scale * <q_i, k_j>, GQA by repeating key heads.
Differentiable by torch's own autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rl_lvr.ops.attention_mass.problem import Problem


def scores(problem: Problem) -> Tensor:
    """s_ij after the soft cap, -inf where query i does not see key j. [B,H,Tq,Tk] float64"""
    query, key = problem.query.double(), problem.key.double()
    key = key.repeat_interleave(problem.group, dim=1)
    s = problem.scale * query @ key.transpose(-1, -2)
    if problem.softcap is not None:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    times = torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    visible = torch.stack([problem.visible(b, times, keys) for b in range(query.shape[0])])
    return s.masked_fill(~visible[:, None], -math.inf)[:, list(problem.heads)]


def select(problem: Problem, values: Tensor) -> Tensor:
    """The rows asked for of `values` [B,H,Tq,...] -> [N,H,...]."""
    return values.transpose(1, 2).flatten(0, 1)[problem.all_rows()]


def log_sum_exp(problem: Problem, sinks: Tensor | None = None) -> Tensor:
    """Natural log of the softmax's denominator, -inf where no key is visible. [B,H,Tq] float64"""
    s = scores(problem)
    if sinks is None:
        empty = s.isneginf().all(-1)
        # logsumexp's gradient of a row of -inf is NaN: such a row is replaced before and after.
        lse = torch.logsumexp(s.masked_fill(empty[..., None], 0.0), -1)
        return lse.masked_fill(empty, -math.inf)
    extra = sinks.double()[list(problem.heads)][:, None, None].expand(*s.shape[:-1], 1)
    return torch.logsumexp(torch.cat([s, extra], -1), -1)


def probabilities(problem: Problem, sinks: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """Attention weights, rows of zeros where no key is visible. lse [B,Hq,Tq]. [B,H,Tq,Tk] float64"""
    s = scores(problem)
    lse = log_sum_exp(problem, sinks) if lse is None else lse.double()[:, list(problem.heads)]
    empty = s.isneginf().all(-1)
    return torch.exp(s - lse.masked_fill(empty, 0.0)[..., None])


def mass(
    problem: Problem, labels: Tensor, regions: int, sinks: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """[N,H,R] float64."""
    p = probabilities(problem, sinks, lse)
    return select(problem, torch.stack([(p * (labels == r)[:, None, None]).sum(-1) for r in range(regions)], -1))


def statistics(problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy -sum p log p in nats, both [N,H] float64; a row without keys has -inf and 0."""
    lse = log_sum_exp(problem)
    p = probabilities(problem)
    log_p = torch.where(p > 0, scores(problem) - lse[..., None], 0.0)
    return select(problem, lse), select(problem, -(p * log_p).sum(-1))
