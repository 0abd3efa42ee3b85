"""Providers of the GPU benchmark for vocab_stats: naive torch, TRL's chunked operator, ours; and what must hold first.

`gate` compares every statistic and gradient with float64 before anything is timed. `measurements` gives closures to
time, one after the other, at the shapes of Qwen2.5-VL-7B; each makes its own outputs and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from entropy import TRL_CHUNK
from torch import Tensor

from rl_lvr.ops.vocab_stats import vocab_stats

HIDDEN, VOCABULARY, ROWS = 3584, 152_064, (8, 64, 512, 2048, 4096)
SMALL_HIDDEN, SMALL_VOCABULARY, SMALL_ROWS = 64, 5003, (8, 64)
BACKWARD_ROWS = (64, 512, 4096)
WORKSPACES = (32, 64, 128)
"""MiB"""
TOP_K = 10
EPSILON = 2e-6


@dataclass(frozen=True)
class Measurement:
    """One cell of the table. `run` is what is timed; its peak memory beyond what stands before is a metric too."""

    provider: str
    mode: str
    """forward: log-probability of a chosen id and entropy; all: top-k and divergence too; backward: of both, forward
    included."""
    rows: int
    config: dict[str, Any]
    run: Callable[[], object]


def inputs(device: torch.device, rows: int, *, small: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """hidden [N, H], weight [V, H], chosen [N], next_row [N], with logits as spread as a trained model's."""
    width, vocabulary = (SMALL_HIDDEN, SMALL_VOCABULARY) if small else (HIDDEN, VOCABULARY)
    random = torch.Generator(device).manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    hidden = normal(rows, width) * torch.linspace(0.5, 6, rows, device=device)[:, None]
    weight = normal(vocabulary, width) / width**0.5
    chosen = torch.randint(vocabulary, (rows,), generator=random, device=device)
    return hidden.to(dtype), weight.to(dtype), chosen, torch.arange(rows, device=device) % 8 != 7


def naive(hidden: Tensor, weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, chosen[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def naive_all(hidden: Tensor, weight: Tensor, chosen: Tensor, next_row: Tensor) -> tuple[Tensor, ...]:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    p = logp.exp()
    divergence = (p[:-1] * (logp[:-1] - logp[1:])).sum(-1) * next_row[:-1]
    entropy = -(p * logp).sum(-1)
    return logp.gather(-1, chosen[:, None])[:, 0], entropy, logp.topk(TOP_K).values, divergence


def trl(hidden: Tensor, weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, chosen, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return logp, entropy


def ours(hidden: Tensor, weight: Tensor, chosen: Tensor, mebibytes: int = 64) -> tuple[Tensor, Tensor]:
    stats = vocab_stats(hidden, weight, chosen=chosen, workspace_bytes=mebibytes << 20)
    assert stats.chosen_logprob is not None
    return stats.chosen_logprob, stats.entropy


def _backward(
    function: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor, chosen: Tensor
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        h = hidden.detach().requires_grad_()
        logp, entropy = function(h, weight, chosen)
        return torch.autograd.grad(logp.sum() + entropy.sum(), h)[0]

    return run


def measurements(device: torch.device, *, small: bool = False) -> Iterator[Measurement]:
    """Every cell; the tensors of one number of rows are made when its first cell is asked for."""
    for rows in SMALL_ROWS if small else ROWS:
        yield from _cells(device, rows, small)


def _cells(device: torch.device, rows: int, small: bool) -> Iterator[Measurement]:
    hidden, weight, chosen, next_row = inputs(device, rows, small=small)
    given = (hidden, weight, chosen)
    everything: dict[str, Any] = {"chosen": chosen, "top_k": TOP_K, "next_row": next_row}
    shape = {"hidden": weight.shape[1], "vocabulary": weight.shape[0], "dtype": "bfloat16"}

    def cell(provider: str, mode: str, run: Callable[[], object], **config: Any) -> Measurement:
        return Measurement(provider, mode, rows, {**shape, **config}, run)

    yield cell("naive", "forward", lambda: naive(*given))
    yield cell("trl", "forward", lambda: trl(*given), chunk=TRL_CHUNK)
    for size in WORKSPACES:
        yield cell("ours", "forward", partial(ours, *given, size), workspace_mib=size)
    yield cell("naive", "all", lambda: naive_all(*given, next_row), top_k=TOP_K)
    yield cell("ours", "all", lambda: vocab_stats(hidden, weight, **everything), top_k=TOP_K, workspace_mib=64)
    if rows in BACKWARD_ROWS:
        yield cell("naive", "backward", _backward(naive, *given))
        yield cell("trl", "backward", _backward(trl, *given), chunk=TRL_CHUNK)
        yield cell("ours", "backward", _backward(ours, *given), workspace_mib=64)


def gate(device: torch.device, *, small: bool = False) -> list[str]:
    """What is wrong, empty if nothing: our errors against float64 are at most twice those of plain torch."""
    faults = []
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, chosen, next_row = inputs(device, 64, small=small, dtype=dtype)
        asked: dict[str, Any] = {"chosen": chosen, "top_k": TOP_K, "next_row": next_row}
        logp = (hidden @ weight.T).float().log_softmax(-1)
        p, top = logp.exp(), logp.topk(TOP_K).values
        follows = next_row.clone()
        follows[-1] = False
        plain = {
            "entropy": -(p * logp).sum(-1),
            "not_top1": 1 - p.amax(-1),
            "renyi2": -(p * p).sum(-1).log(),
            "topk_mass": top.exp().sum(-1),
            "topk_mean_logprob": top.mean(-1),
            "kl_next": torch.where(follows, (p * (logp - logp.roll(-1, 0))).sum(-1), 0.0),
            "chosen_logprob": logp.gather(-1, chosen[:, None])[:, 0],
        }
        stats = vocab_stats(hidden, weight, **asked)
        truth = vocab_stats(hidden, weight, **asked, backend="reference")
        for name, theirs in plain.items():
            exact = getattr(truth, name).double()
            scale = exact.abs().clamp(min=1)
            error = float(((getattr(stats, name) - exact).abs() / scale).max())
            allowed = 2 * float(((theirs - exact).abs() / scale).max()) + EPSILON
            if not error <= allowed:
                faults.append(f"vocab_stats {name} in {dtype}: error {error:.1e}, allowed {allowed:.1e}")
        exact = _backward(_reference, hidden, weight, chosen)().double()
        error, theirs_error = (
            float((_backward(f, hidden, weight, chosen)().double() - exact).norm() / exact.norm())
            for f in (ours, naive)
        )
        if not error <= 2 * theirs_error + EPSILON:
            faults.append(f"vocab_stats gradient in {dtype}: error {error:.1e}, plain torch's {theirs_error:.1e}")
    return faults


def _reference(hidden: Tensor, weight: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    stats = vocab_stats(hidden, weight, chosen=chosen, backend="reference")
    assert stats.chosen_logprob is not None
    return stats.chosen_logprob, stats.entropy
