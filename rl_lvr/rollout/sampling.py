"""Logits -> the distribution that a token is drawn from, and the draw. Pure functions on [B, V], nothing else.

The order is vLLM's: bans, bias on START, repetition penalty, temperature, min-p, top-k, top-p. (transformers applies
min-p last; the two differ only where min-p and top-p are both set.) Each filter keeps the set that transformers' warper
of that name keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lvr.latents.noise import keyed_uniform
from rl_lvr.rollout.gumbel import noised_argmax
from rl_lvr.rollout.types import Sampling

_BANNED = float("-inf")


def ban(logits: Tensor, ids: Tensor) -> Tensor:
    """Token ids [n] that no row may draw."""
    return logits.index_fill(1, ids, _BANNED)


def ban_in_rows(logits: Tensor, token: int, rows: Tensor) -> Tensor:
    """One token that the rows marked in `rows` [B] may not draw."""
    logits = logits.clone()
    logits[:, token] = logits[:, token].masked_fill(rows, _BANNED)
    return logits


def bias_in_rows(logits: Tensor, token: int, bias: Tensor) -> Tensor:
    """Add `bias` [B] to the logit of one token. A ban stays a ban."""
    logits = logits.clone()
    logits[:, token] += bias
    return logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty (CTRL, 1909.05858): tokens in `seen` [B, V], of prompt or completion, become less likely."""
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens with less than `min_p` times the probability of the likeliest one."""
    if min_p == 0.0:
        return logits
    least = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(min_p))
    return logits.masked_fill(logits < least, _BANNED)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` likeliest tokens, and those that tie with the last of them."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, _BANNED)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches `top_p`."""
    if top_p == 1.0:
        return logits
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return logits.masked_fill(torch.empty_like(dropped).scatter_(-1, order, dropped), _BANNED)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature and truncation. Greedy rows stay as they are: what is left out could not be drawn anyway."""
    if sampling.temperature == 0.0:
        return logits
    logits = heat(logits, sampling.temperature)
    return keep_top_p(keep_top_k(keep_min_p(logits, sampling.min_p), sampling.top_k), sampling.top_p)


def heat(logits: Tensor, temperature: float) -> Tensor:
    """Temperature alone; greedy rows are at 1."""
    return logits if temperature in (0.0, 1.0) else logits / temperature


def uncut(whole: Tensor, warped: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What `Uncut` holds of the chosen `index` [B]: its log-prob, and the log of the kept mass.

    `whole` [B, V] are logits at the sampling temperature, with bans and nothing else; `warped` those that were drawn
    from.
    """
    total = whole.logsumexp(-1)
    kept = whole.masked_fill(warped == _BANNED, _BANNED).logsumexp(-1)
    return whole.gather(-1, index[:, None])[:, 0] - total, (kept - total).clamp(max=0.0)


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob under softmax(logits). `positions` [B] are those that the tokens will take.

    Gumbel-max (Maddison et al., 1411.0030) with vLLM's noise, keyed by (request seed, position, token): neither the
    other rows nor the order of calls can change a draw, and vLLM draws the same tokens from the same logits.
    """
    logprobs = logits.log_softmax(-1)
    index = logits.argmax(-1) if greedy else noised_argmax(logits, seeds, positions - 1)
    return index, logprobs.gather(-1, index[:, None])[:, 0]


def decide(pairs: Tensor, seeds: Tensor, positions: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """0 or 1 per row of two logits [B, 2], and its log-prob: `end_or_not`'s decision, which every engine takes here.

    Inverse CDF of a number keyed by (request seed, position), in float64.
    """
    logprobs = pairs.log_softmax(-1)
    if greedy:
        index = logprobs.argmax(-1)
    else:
        probs = logprobs.double().exp()
        index = (keyed_uniform(seeds, positions) * probs.sum(-1) >= probs[:, 0]).long()
    return index, logprobs.gather(-1, index[:, None])[:, 0]


def end_or_not(logits: Tensor, end: int) -> Tensor:
    """The `free` length decision as two logits [B, 2]: END, and anything else together. Takes the raw logits."""
    others = logits.index_fill(1, torch.tensor([end], device=logits.device), _BANNED)
    return torch.stack((logits[:, end], others.logsumexp(-1)), -1)


def seen_tokens(rows: list[list[int]], vocabulary: int, device: torch.device) -> Tensor:
    """[B, V], True for every token of a row: the start of the repetition penalty's memory."""
    seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
    for row, ids in enumerate(rows):
        seen[row, torch.tensor(ids, dtype=torch.long)] = True
    return seen.to(device)
