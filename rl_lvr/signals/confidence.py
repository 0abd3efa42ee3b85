"""Confidence signals: the next-token distribution p at every latent position (logits there, full vocabulary).

Two forms of paper A's reward (2605.02735) exist, and neither is "the" reward: its text rewards a falling entropy, its
released code absolute sharpness plus a small log-ratio (research notes: docs/signals.md).
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats import MAX_TOP_K
from rl_lvr.signals.declaring import Needs, signal
from rl_lvr.signals.forward import Forward
from rl_lvr.signals.parameters import Range
from rl_lvr.signals.values import Values

Per = Literal["completion", "latent"]
TopK = Annotated[int, Range(1, MAX_TOP_K)]
VOCABULARY = Needs(vocabulary=True)
EPSILON = 1e-8  # in the log-ratio of paper A's code


def _column(f: Forward, values: Tensor, per: Per) -> Values:
    """`values` [V] at the latents: their mean, or the list of them."""
    rows, kept = f.at_latents(values)
    return f.per_sequence(kept, rows) if per == "completion" else f.per_row(kept, rows)


def _asked(values: Tensor | None) -> Tensor:
    assert values is not None  # `Forward.vocabulary` was asked for it
    return values


@signal(VOCABULARY)
def latent_entropy(f: Forward, *, per: Per = "completion") -> Values:
    """Entropy -sum p log p in nats at latent positions: E of paper A's Eq. 5. The count is the number of latents."""
    return _column(f, f.vocabulary(0).entropy, per)


@signal(VOCABULARY)
def latent_top_k_mass(f: Forward, *, k: TopK = 10, per: Per = "completion") -> Values:
    """Probability of the k likeliest tokens, those of paper A's confidence. The count is the number of latents.

    Without gradient.
    """
    return _column(f, _asked(f.vocabulary(k).topk_mass), per)


@signal(VOCABULARY)
def latent_confidence(f: Forward, *, k: TopK = 10, per: Per = "completion") -> Values:
    """Paper A's confidence C as coded: mean over latents of c_i = -(1/k) sum over the k likeliest tokens of log p.

    Larger is sharper: the tail of the k is then improbable. The code adds 1e-10 to every probability, so it never
    exceeds 23.03 nats per token; here nothing is added.
    """
    return _column(f, -_asked(f.vocabulary(k).topk_mean_logprob), per)


@signal(VOCABULARY)
def entropy_drop(f: Forward) -> Values:
    """Paper A's confidence-progression reward as its text has it (Eq. 5, second-hand): mean of max(0, E_i - E_{i+1}).

    E_i is the entropy at latent i; pairs are neighbours within one span, and their number is the count.
    """
    rows, entropy = f.at_latents(f.vocabulary(0).entropy)
    pairs = f.neighbours(rows)
    return f.per_sequence((entropy[:-1] - entropy[1:]).clamp_min(0)[pairs.to(entropy.device)], rows[:-1][pairs])


@signal(VOCABULARY)
def confidence_progression(f: Forward, *, k: TopK = 10) -> Values:
    """Paper A's progression G as coded: mean over neighbouring latents of log((c_{i+1} + eps) / (c_i + eps)).

    c_i is that of `latent_confidence`, eps = 1e-8; pairs are neighbours within one span, and their number is the count.
    """
    rows, mean_logprob = f.at_latents(_asked(f.vocabulary(k).topk_mean_logprob))
    logs = torch.log(EPSILON - mean_logprob)
    pairs = f.neighbours(rows)
    return f.per_sequence((logs[1:] - logs[:-1])[pairs.to(logs.device)], rows[:-1][pairs])


@signal(VOCABULARY)
def confidence_reward(f: Forward, *, k: TopK = 10, weight: float = 0.05) -> Values:
    """Paper A's Stage II reward as coded: R = C + weight * G. The count is the number of latents."""
    confidence, progression = latent_confidence(f, k=k), confidence_progression(f, k=k)
    return Values(confidence.values.double() + weight * progression.values.double(), confidence.counts)


@signal(Needs(vocabulary=True, end=True))
def end_at_first_slot(f: Forward, *, state: Literal["slot", "before"] = "slot") -> Values:
    """Probability of END at each span's first latent, mean over the sequence's spans; the count is their number.

    `slot`: at the first latent's own position, the drift that paper A's evidence figure shows. `before`: at the
    position before it, where a format of free length decides.
    """
    probability = _asked(f.vocabulary(0).chosen_logprob).exp()
    first = first_latents(f.regions.spans.latent, f.regions.spans.index, before=state == "before")
    kept = first.flatten()[f.vocabulary_rows]
    return f.per_sequence(probability[kept.to(probability.device)], f.vocabulary_rows[kept])


def first_latents(latent: Tensor, index: Tensor, *, before: bool = False) -> Tensor:
    """[B, T] bool, the first latent of every span, or the position before it (none at the start of a row).

    `latent` [B, T] bool and `index` [B, T] are those of `SpanMasks`.
    """
    previous = torch.nn.functional.pad(latent, (1, 0))[:, :-1]
    same = index == torch.nn.functional.pad(index, (1, 0), value=-1)[:, :-1]
    first = latent & ~(previous & same)
    return torch.nn.functional.pad(first, (0, 1))[:, 1:] if before else first
