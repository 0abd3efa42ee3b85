"""The definitions, in float64, with all logits in memory: what the other backends are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats.stats import VocabStats
from rl_lvr.ops.vocab_stats.sweep import Head


def logits_of(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """[N, V] float64."""
    h = hidden.double()
    logits = h @ head.weight.double().T
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + head.scaling * (h @ head.lora_a.double().T) @ head.lora_b.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    return logits / temperature


def reference(
    hidden: Tensor, head: Head, chosen: Tensor | None, top_k: int, next_row: Tensor | None, temperature: float
) -> VocabStats:
    """Differentiable by autograd."""
    logits = logits_of(hidden, head, temperature)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    safe = logp.masked_fill(p == 0, 0.0)  # 0 log 0 = 0
    top1, top1_id = p.max(-1)
    top = logp.topk(top_k, dim=-1).values if top_k else None

    def out(value: Tensor) -> Tensor:
        return value if hidden.dtype == torch.float64 else value.float()

    divergence = None
    if next_row is not None:
        terms = (p * (logp - logp.roll(-1, 0))).masked_fill(p == 0, 0.0)
        follows = next_row.clone()
        follows[-1:] = False
        divergence = out(torch.where(follows, terms.sum(-1), 0.0)).detach()
    return VocabStats(
        log_z=out(logits.logsumexp(-1)),
        entropy=out(-(p * safe).sum(-1)),
        top1_id=top1_id,
        top1=out(top1),
        not_top1=out(p.scatter(-1, top1_id[:, None], 0.0).sum(-1)),
        renyi2=out(-(p * p).sum(-1).log()),
        topk_mass=None if top is None else out(top.exp().sum(-1)).detach(),
        topk_mean_logprob=None if top is None else out(top.mean(-1)),
        kl_next=divergence,
        chosen_logprob=None if chosen is None else out(logp.gather(-1, chosen[:, None])[:, 0]),
    )
