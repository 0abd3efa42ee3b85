"""Heads, rows and measures shared by the tests of vocab_stats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_lvr.ops.backends import interpreted
from rl_lvr.ops.vocab_stats import VocabStats, vocab_stats

FLOATS = (
    "log_z",
    "entropy",
    "top1",
    "not_top1",
    "renyi2",
    "topk_mass",
    "topk_mean_logprob",
    "kl_next",
    "chosen_logprob",
)
DIFFERENTIABLE = ("log_z", "entropy", "top1", "not_top1", "renyi2", "topk_mean_logprob", "chosen_logprob")


def here() -> str:
    """The backend under test: test_vocab_stats_kernels.py runs the same files once more in Triton's interpreter."""
    return "triton" if interpreted() else "torch"


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    asked: dict[str, Any]

    def run(self, backend: str, **changes: Any) -> VocabStats:
        return vocab_stats(self.hidden, self.weight, backend=backend, **{**self.asked, **changes})

    def to(self, dtype: torch.dtype) -> Case:
        """Floats rounded to `dtype`."""
        bias, (a, b, scaling) = self.asked["bias"], self.asked["lora"]
        asked = {**self.asked, "bias": bias.to(dtype), "lora": (a.to(dtype), b.to(dtype), scaling)}
        return Case(self.hidden.to(dtype), self.weight.to(dtype), asked)

    def logits(self) -> Tensor:
        """Everything in the case's own precision, as a plain forward pass makes them."""
        a, b, scaling = self.asked["lora"]
        adapted = self.hidden @ self.weight.T + (self.hidden @ a.T) @ b.T * scaling + self.asked["bias"]
        return adapted / self.asked["temperature"]


def case(rows: int = 6, width: int = 16, vocabulary: int = 1003, *, sharpness: float = 1.0, seed: int = 0) -> Case:
    """Everything asked for at once: bias, adapter, temperature, chosen ids, top-k, spans of three rows."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    asked = {
        "bias": normal(vocabulary),
        "lora": (normal(4, width) / 4, normal(vocabulary, 4) / 4, 0.5),
        "chosen": torch.randint(vocabulary, (rows,), generator=random),
        "top_k": min(10, vocabulary),
        "next_row": torch.arange(rows) % 3 != 2,
        "temperature": 0.7,
    }
    return Case(normal(rows, width) * sharpness, normal(vocabulary, width), asked)


def from_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, weight) whose product is `logits` [N, V] without rounding."""
    return torch.eye(len(logits), dtype=logits.dtype), logits.T.contiguous()


def worst(stats: VocabStats, truth: VocabStats, name: str) -> float:
    """Largest error of one statistic relative to max(|truth|, 1): the logits' own rounding is absolute."""
    value, exact = getattr(stats, name).double(), getattr(truth, name).double()
    return float(((value - exact).abs() / exact.abs().clamp(min=1)).max())


def plain(logits: Tensor, like: Case) -> VocabStats:
    """The textbook formulas in float32 on `logits`."""
    logp = logits.float().log_softmax(-1)
    p = logp.exp()
    top = logp.topk(like.asked["top_k"], dim=-1).values
    follows = like.asked["next_row"].clone()
    follows[-1] = False
    divergence = (p * (logp - logp.roll(-1, 0))).sum(-1)
    return VocabStats(
        log_z=logits.float().logsumexp(-1),
        entropy=-(p * logp).sum(-1),
        top1_id=p.argmax(-1),
        top1=p.amax(-1),
        not_top1=1 - p.amax(-1),
        renyi2=-(p * p).sum(-1).log(),
        topk_mass=top.exp().sum(-1),
        topk_mean_logprob=top.mean(-1),
        kl_next=torch.where(follows, divergence, 0.0),
        chosen_logprob=logp.gather(-1, like.asked["chosen"][:, None])[:, 0],
    )
