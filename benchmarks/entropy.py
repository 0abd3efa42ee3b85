"""Relative error of the entropy in float32, from 10 nats down to 1e-7, at the vocabulary of Qwen2.5-VL.

Rows are logits with one id ahead of a Gaussian crowd by as much as gives the wanted entropy. All formulas get the same
float32 logits, and float64 is the truth. `python benchmarks/entropy.py` prints the table of docs/ops.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats import vocab_stats

TRL_CHUNK = 32768  # ids per tile in TRL 1.16's trainers
VOCABULARY = 152_064
LEVELS = (10.0, 5.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ROWS = 4


@dataclass(frozen=True)
class Errors:
    """Relative errors of the rows at one entropy, by formula."""

    nats: float
    median: dict[str, float]
    largest: dict[str, float]


def exact_entropy(logits: Tensor) -> Tensor:
    """[N] float64, with the sum over all but the largest logit, so that float64 has digits to spare."""
    z = logits.double()
    top, place = z.max(-1, keepdim=True)
    others = (z - top).exp().scatter(-1, place, 0.0)
    rest, moment = others.sum(-1), (others * (z - top)).sum(-1)
    return rest.log1p() - moment / (1 + rest)


def logits_of_entropy(nats: float, rows: int = ROWS, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    """[rows, V] float32 whose entropies are close to `nats`: the lead of one id, by bisection."""
    crowd = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    places = torch.arange(rows) * (vocabulary // (rows + 1)) + 17
    low, high = torch.zeros(rows), torch.full((rows,), 60.0)
    for _ in range(24):
        middle = (low + high) / 2
        crowd[torch.arange(rows), places] = middle
        unsure = exact_entropy(crowd) > nats
        low, high = torch.where(unsure, middle, low), torch.where(unsure, high, middle)
    return crowd


def ours(logits: Tensor, backend: str = "auto") -> Tensor:
    hidden, weight = _as_product(logits)
    return vocab_stats(hidden, weight, backend=backend).entropy


def trl(logits: Tensor) -> Tensor:
    """TRL's fused log-probabilities and entropies, as its trainers call them."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight = _as_product(logits)
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[1]


def plain(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {"ours": ours, "trl": trl, "plain": plain}


def errors_at(nats: float) -> Errors:
    logits = logits_of_entropy(nats)
    truth = exact_entropy(logits)
    with torch.no_grad():
        relative = {name: ((f(logits).double() - truth).abs() / truth) for name, f in FORMULAS.items()}
    return Errors(
        nats=float(truth.median()),
        median={name: float(error.median()) for name, error in relative.items()},
        largest={name: float(error.max()) for name, error in relative.items()},
    )


def entropy_errors() -> dict[str, float]:
    """The largest relative error of each formula over all levels."""
    table = [errors_at(nats) for nats in LEVELS]
    return {name: max(row.largest[name] for row in table) for name in FORMULAS}


def _as_product(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, weight) whose product is `logits`, without rounding."""
    return torch.eye(len(logits)), logits.T.contiguous()


def main() -> None:
    print(f"| entropy, nats | {' | '.join(f'{name}: median, largest' for name in FORMULAS)} |")
    print("|---" * (len(FORMULAS) + 1) + "|")
    worst = dict.fromkeys(FORMULAS, 0.0)
    for nats in LEVELS:
        row = errors_at(nats)
        cells = [f"{row.median[name]:.1e}, {row.largest[name]:.1e}" for name in FORMULAS]
        print(f"| {row.nats:.1e} | {' | '.join(cells)} |", flush=True)
        worst = {name: max(worst[name], row.largest[name]) for name in FORMULAS}
    print(json.dumps({"entropy_rel_err": worst}))


if __name__ == "__main__":
    main()
