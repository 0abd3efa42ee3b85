"""END against one more latent: a draw between two logits, with the settings of each row's own request."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lvr.rollout import sampling as draws


def warp_pairs(pairs: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`rollout.sampling.warp` of two logits per row, [N, 2], where every row has settings of its own. [N] each."""
    greedy = temperature == 0
    scaled = pairs / torch.where(greedy, 1.0, temperature)[:, None]
    likelier = scaled.amax(-1, keepdim=True)
    dropped = scaled < likelier + torch.log(min_p)[:, None]
    dropped |= (top_k == 1)[:, None] & (scaled < likelier)
    warped = scaled.masked_fill(dropped, float("-inf"))
    rest = warped.softmax(-1)
    first = torch.stack((warped[:, 0] <= warped[:, 1], warped[:, 0] > warped[:, 1]), -1)
    dropped = (top_p < 1)[:, None] & first & (rest <= (1 - top_p)[:, None])
    return torch.where(greedy[:, None], pairs, warped.masked_fill(dropped, float("-inf")))


def uncut_pairs(pairs: Tensor, warped: Tensor, temperature: Tensor, index: Tensor) -> Tensor:
    """`rollout.sampling.uncut` of the decisions `index`, [N, 2]."""
    whole = pairs / torch.where(temperature == 0, 1.0, temperature)[:, None]
    return torch.stack(draws.uncut(whole, warped, index), -1)


def draw_pairs(pairs: Tensor, greedy: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """0 (END) or 1 per row and its log-prob, by the numbers that the reference engine uses. [N] each."""
    index, logprobs = draws.decide(pairs, seeds, positions, greedy=False)
    best, best_logprobs = draws.decide(pairs, seeds, positions, greedy=True)
    return torch.where(greedy, best, index), torch.where(greedy, best_logprobs, logprobs)
