"""dL/dlogits of the statistics: a few numbers per row, then one formula for every id.

With p_j = exp(z_j - m) / (1 + rest): dH/dz_j = p_j (E[z] - z_j), dlog p_c/dz_j = 1[j = c] - p_j, and
dRenyi2/dz_j = 2 p_j (1 - p_j / sum p^2). The shifted form of the first keeps its digits; p (log p + H) does not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats.partial import Partial


@dataclass(frozen=True)
class Coefficients:
    """[N] each, of dL/dz_j =

    p_j (linear + entropy (mean - y_j) + renyi (1 - ratio exp(y_j))) + chosen_weight 1[j = chosen]
    + top_weight 1[j in top_ids], with y_j = z_j - maximum and p_j = inverse exp(y_j); at the argmax, where p_j may
    round to 1 and the terms cancel, it is `at_top`.
    """

    maximum: Tensor
    inverse: Tensor
    linear: Tensor
    entropy: Tensor
    mean: Tensor
    renyi: Tensor
    ratio: Tensor
    chosen_weight: Tensor
    top_weight: Tensor
    at_top: Tensor
    argmax: Tensor
    """int64"""
    chosen: Tensor
    """int64, -1 where nothing was chosen."""
    top_ids: Tensor
    """[N, k] int64"""

    @cached_property
    def packed(self) -> Tensor:
        """[10, N], the floats, in the order of the fields: one pointer for a kernel."""
        return torch.stack([getattr(self, field.name) for field in fields(self)[:10]])

    def rows(self, block: slice) -> Coefficients:
        return Coefficients(**{field.name: getattr(self, field.name)[block] for field in fields(self)})


def coefficients(part: Partial, chosen: Tensor | None, wanted: Tensor, temperature: float) -> Coefficients:
    """`wanted` [9, N] is dL/d of `stats.values_of`. Those of the top-k mass and of the divergence are ignored."""
    log_z, entropy, top1, not_top1, renyi, _, top_mean, _, chosen_logprob = (wanted / temperature).unbind()
    inverse = 1 / (1 + part.rest)
    not_p = part.rest * inverse  # 1 - p at the argmax
    mean = part.moment * inverse
    at_argmax = (top1 - not_top1) * inverse  # d(p_a)/dz_j = p_a (1[j = a] - p_j)
    top_k = part.top_ids.shape[1]
    if chosen is None:
        chosen, hit = torch.full_like(part.argmax, -1), torch.zeros_like(inverse)
    else:
        hit = (chosen == part.argmax).to(inverse.dtype)
    per_top = 1 / top_k if top_k else 0.0
    at_top = (
        log_z * inverse
        + entropy * inverse * mean
        + at_argmax * not_p
        + 2 * renyi * inverse * (part.square - part.rest) / (1 + part.square)
        + chosen_logprob * ((hit - 1) + not_p)
        + top_mean * ((per_top - 1) + not_p)
    )
    return Coefficients(
        maximum=part.maximum,
        inverse=inverse,
        linear=log_z - at_argmax - chosen_logprob - top_mean,
        entropy=entropy,
        mean=mean,
        renyi=2 * renyi,
        ratio=(1 + part.rest) / (1 + part.square),
        chosen_weight=chosen_logprob,
        top_weight=top_mean * per_top,
        at_top=at_top,
        argmax=part.argmax,
        chosen=chosen,
        top_ids=part.top_ids,
    )
