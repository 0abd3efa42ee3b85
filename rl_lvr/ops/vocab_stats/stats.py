"""What is known of each row's softmax, made from the sums over its whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats.partial import Partial


@dataclass(frozen=True)
class VocabStats:
    """Statistics of p = softmax(z / temperature) for N rows; [N] float32 (float64 for float64 inputs) unless said."""

    log_z: Tensor
    """log of the sum of exp(z / temperature)."""
    entropy: Tensor
    """-sum p log p, nats."""
    top1_id: Tensor
    """int64, the id of the largest probability, the lowest of equals."""
    top1: Tensor
    """The largest probability."""
    not_top1: Tensor
    """1 - top1, accurate where top1 rounds to 1."""
    renyi2: Tensor
    """-log sum p^2, nats."""
    topk_mass: Tensor | None
    """Sum of the k largest probabilities; None for top_k = 0."""
    topk_mean_logprob: Tensor | None
    """Mean of the k largest log-probabilities; None for top_k = 0."""
    kl_next: Tensor | None
    """KL(p_t || p_{t+1}) where next_row[t], else 0; None without next_row. No gradient."""
    chosen_logprob: Tensor | None
    """log p of the chosen id; None without chosen."""


def finish(part: Partial, *, next_row: Tensor | None = None, with_chosen: bool = False) -> VocabStats:
    """The statistics of rows whose whole vocabulary is in `part`."""
    values = values_of(part, next_row)
    top_k = part.top_values.shape[1]
    return from_values(values, part.argmax, top_k > 0, next_row is not None, with_chosen)


def values_of(part: Partial, next_row: Tensor | None) -> Tensor:
    """[9, N], the floats of VocabStats in the order of its fields; 0 for what was not asked for."""
    total = 1 + part.rest
    log_total = part.rest.log1p()
    zero = torch.zeros_like(log_total)
    shifted = part.top_values - part.maximum[:, None]
    asked = part.top_values.shape[1] > 0
    return torch.stack(
        [
            part.maximum + log_total,
            log_total - part.moment / total,
            1 / total,
            part.rest / total,
            2 * log_total - part.square.log1p(),
            shifted.exp().sum(1) / total if asked else zero,
            shifted.mean(1) - log_total if asked else zero,
            zero if next_row is None else _divergence(part, next_row),
            part.chosen - part.maximum - log_total,
        ]
    )


def _divergence(part: Partial, next_row: Tensor) -> Tensor:
    """KL(p_t || p_{t+1}) = E_t[z_t - m_t] - E_t[z_{t+1} - m_{t+1}] - log(1 + rest_t) + log(1 + rest_{t+1})."""
    log_total = part.rest.log1p()
    expected = (part.moment - part.cross) / (1 + part.rest)
    value = (expected - log_total + log_total.roll(-1)).clamp(min=0)
    follows = next_row.clone()
    follows[-1:] = False
    return torch.where(follows, value, torch.zeros_like(value))


def from_values(values: Tensor, top1_id: Tensor, with_top_k: bool, with_kl: bool, with_chosen: bool) -> VocabStats:
    """`values` [9, N] as `values_of` gives them, with None for what was not asked for."""
    log_z, entropy, top1, not_top1, renyi2, mass, mean_logprob, divergence, chosen = values.unbind()
    return VocabStats(
        log_z=log_z,
        entropy=entropy,
        top1_id=top1_id,
        top1=top1,
        not_top1=not_top1,
        renyi2=renyi2,
        topk_mass=mass.detach() if with_top_k else None,
        topk_mean_logprob=mean_logprob if with_top_k else None,
        kl_next=divergence.detach() if with_kl else None,
        chosen_logprob=chosen if with_chosen else None,
    )
