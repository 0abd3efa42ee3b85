"""Layers of attention and measures shared by the tests of attention_mass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rl_lvr.ops.attention_mass import Reduced, attention_mass, attention_mass_reduced, log_sum_exp, reference
from rl_lvr.ops.attention_mass.problem import Problem
from rl_lvr.ops.backends import interpreted

WHOLE_ROW = ("rows", "heads")  # a log-sum-exp is given for all of these
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows": {"rows": torch.tensor([0, 5, 6, 7, 8, 20, 21, 36, 37, 60])},
    "padded": {"segments": True},
    "window": {"segments": True, "window": 11, "rows": torch.arange(3, 70, 4)},
    "softcap": {"softcap": 1.5, "heads": [5, 0, 3]},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -2.0]), "heads": [4, 1]},
}


def here() -> str:
    """The backend under test: test_attention_mass_kernels.py runs test_attention_mass.py again in the interpreter."""
    return "triton" if interpreted() else "torch"


@dataclass(frozen=True)
class Case:
    query: Tensor  # [B,Hq,Tq,d], strided as transformers has it
    key: Tensor
    labels: Tensor
    regions: int
    asked: dict[str, Any]

    @property
    def problem(self) -> Problem:
        asked = {"rows": None, "segments": None, "window": None, "softcap": None, "heads": None, **self.asked}
        heads = tuple(range(self.query.shape[1]) if asked.pop("heads") is None else self.asked["heads"])
        asked.pop("sinks", None)
        return Problem(self.query, self.key, heads=heads, **asked)

    def exact(self) -> Tensor:
        """[N,H,R] float64, straight from the definition."""
        return reference.mass(self.problem, self.labels, self.regions, self.asked.get("sinks"))

    def lse(self, backend: str) -> Tensor:
        """[B,Hq,Tq]"""
        asked = {name: value for name, value in self.asked.items() if name not in WHOLE_ROW}
        batch, heads, queries, _ = self.query.shape
        flat = log_sum_exp(self.query, self.key, backend=backend, **asked)
        return flat.view(batch, queries, heads).transpose(1, 2)

    def given_lse(self) -> dict[str, Any]:
        """Arguments of path A."""
        asked = {name: value for name, value in self.asked.items() if name != "sinks"}
        return {**asked, "lse": self.lse("torch")}

    def mass(self, backend: str, path: str = "B") -> Tensor:
        asked = self.given_lse() if path == "A" else self.asked
        return attention_mass(self.query, self.key, self.labels, self.regions, backend=backend, **asked)

    def reduced(self, weights: Tensor, backend: str, path: str = "B") -> Reduced:
        asked = self.given_lse() if path == "A" else self.asked
        return attention_mass_reduced(
            self.query, self.key, self.labels, self.regions, weights=weights, backend=backend, **asked
        )

    def to(self, dtype: torch.dtype) -> Case:
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype))

    def but(self, **changes: Any) -> Case:
        return replace(self, asked={**self.asked, **changes})

    def plain(self) -> Tensor:
        """Eager attention in the case's own precision, softmax in float32, as transformers has it. [N,H,R]"""
        problem = self.problem
        key = self.key.repeat_interleave(problem.group, dim=1)
        s = (self.query @ key.transpose(-1, -2)) * problem.scale
        if problem.softcap is not None:
            s = problem.softcap * torch.tanh(s / problem.softcap)
        hidden = reference.scores(replace(problem, heads=tuple(range(self.query.shape[1])))).isneginf()
        s = s.float().masked_fill(hidden, torch.finfo(torch.float32).min)
        sinks = self.asked.get("sinks")
        if sinks is not None:
            s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:-1], 1)], -1)
        p = torch.softmax(s, -1).to(self.query.dtype)[..., : key.shape[2]].masked_fill(hidden, 0.0)
        p = p[:, list(problem.heads)]
        masses = [(p * (self.labels == r)[:, None, None]).sum(-1) for r in range(self.regions)]
        return reference.select(problem, torch.stack(masses, -1))


def case(
    variant: str = "plain",
    *,
    batch: int = 2,
    heads: tuple[int, int] = (6, 2),
    queries: int = 37,
    keys: int = 45,
    width: int = 12,
    sharpness: float = 1.0,
    seed: int = 0,
) -> Case:
    """Regions 0 (many keys, like an image), 1 (a short span) and 2 (single tokens); most keys are in none."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, heads[0], width, generator=random).transpose(1, 2)
    key = torch.randn(batch, keys, heads[1], width, generator=random).transpose(1, 2)
    labels = torch.full((batch, keys), -1)
    labels[:, keys // 5 : keys // 2] = 0
    labels[:, keys // 2 + 2 : keys // 2 + 6] = 1
    labels[0, :: keys // 4] = 2
    asked = {"scale": sharpness * width**-0.5, **VARIANTS[variant]}
    if "segments" in asked:
        asked["segments"] = padded_and_packed(batch, keys)
    return Case(query, key, labels, 3, asked)


def padded_and_packed(batch: int, keys: int) -> Tensor:
    """Rows in turn: padded on the left; two sequences, then padding on the right."""
    segments = torch.zeros(batch, keys, dtype=torch.long)
    segments[::2, : keys // 4] = -1
    segments[1::2, keys // 3 :] = 1
    segments[1::2, -keys // 6 :] = -1
    return segments


def worst(values: Tensor, truth: Tensor) -> float:
    return float((values.detach().double() - truth.detach().double()).abs().max())
