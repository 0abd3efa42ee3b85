"""Statistics of softmax(h W^T) at chosen positions, without the logits in memory: entropy, top-k, divergence, gradient.

The vocabulary is walked once, in slices of a bounded workspace with float32 logits; see `partial` for the arithmetic.
`rl_lvr.ops.backends` decides what runs. The head is a constant: gradients go to the hidden states alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats.head import HeadWeights, head_weights
from rl_lvr.ops.vocab_stats.op import NAME, folding, vocab_stats_op
from rl_lvr.ops.vocab_stats.partial import Partial, merge, merge_shards
from rl_lvr.ops.vocab_stats.reference import reference
from rl_lvr.ops.vocab_stats.stats import VocabStats, finish, from_values
from rl_lvr.ops.vocab_stats.sweep import Head, accumulation_dtype, forward

__all__ = [
    "HeadWeights",
    "Partial",
    "VocabStats",
    "finish",
    "head_weights",
    "merge",
    "merge_shards",
    "partial_stats",
    "vocab_stats",
]

MAX_TOP_K = 64
WORKSPACE_BYTES = 64 << 20

Lora = tuple[Tensor, Tensor, float]
"""(A [r, H], B [V, r], scaling): z = h W^T + scaling (h A^T) B^T."""


def vocab_stats(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    chosen: Tensor | None = None,
    top_k: int = 0,
    next_row: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> VocabStats:
    """Statistics of the N rows of `hidden` [N, H] under the head `weight` [V, H], `bias` [V] and `lora`.

    `chosen` [N] int64 asks for a log-probability per row; `next_row` [N] bool, true where the row after this one
    follows it in its span, for KL(p_t || p_{t+1}). Differentiable with respect to `hidden`, all but the top-k mass
    and the divergence. Where all logits fit in `workspace_bytes` they are kept, and the backward pass makes none anew.
    """
    head = _checked(hidden, weight, bias, lora, top_k, temperature)
    _check_rows(hidden, chosen, next_row)
    _refuse_gradient_to_head(hidden, head)
    if backend == "reference":
        return reference(hidden, head, chosen, top_k, next_row, temperature)
    fits = hidden.shape[0] * weight.shape[0] * accumulation_dtype(hidden, head).itemsize <= workspace_bytes
    keep = fits and hidden.requires_grad and torch.is_grad_enabled()
    values, argmax, _, _, _ = vocab_stats_op(
        hidden,
        head.weight,
        head.bias,
        head.lora_a,
        head.lora_b,
        head.scaling,
        chosen,
        next_row,
        top_k,
        temperature,
        workspace_bytes,
        keep,
        backend,
    )
    return from_values(values, argmax, top_k > 0, next_row is not None, chosen is not None)


@torch.no_grad()
def partial_stats(
    hidden: Tensor,
    weight: Tensor,
    first_id: int,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    chosen: Tensor | None = None,
    top_k: int = 0,
    next_row: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Partial:
    """The same for a shard of the vocabulary whose first id is `first_id`; `chosen` has global ids. No gradient.

    `merge` (or `merge_shards`, over processes) joins the shards, `finish` makes their statistics.
    """
    head = _checked(hidden, weight, bias, lora, top_k, temperature)
    _check_rows(hidden, chosen, next_row)
    return forward(
        hidden,
        head,
        folding(hidden, weight, backend)[0],
        chosen=chosen,
        next_row=next_row,
        top_k=top_k,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
        first_id=first_id,
    )


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None, top_k: int, temperature: float
) -> Head:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise UserError(f"{NAME}: hidden [N, H] and weight [V, H] are needed, not {shapes} (see head_weights).")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise UserError(f"{NAME}: a quantised head ({weight.dtype}) has no logits to take: use the head's float copy.")
    if not 0 <= top_k <= min(MAX_TOP_K, len(weight)):
        raise UserError(f"{NAME}: top_k is {top_k}: choose 0 to {min(MAX_TOP_K, len(weight))}.")
    if not temperature > 0:
        raise UserError(f"{NAME}: temperature is {temperature}: it has to be above 0.")
    lora_a, lora_b, scaling = lora if lora is not None else (None, None, 1.0)
    return Head(weight, bias, lora_a, lora_b, scaling)


def _check_rows(hidden: Tensor, chosen: Tensor | None, next_row: Tensor | None) -> None:
    rows = hidden.shape[0]
    if chosen is not None and (chosen.shape != (rows,) or chosen.dtype != torch.int64):
        raise UserError(f"{NAME}: chosen has to be [N] int64, not {tuple(chosen.shape)} {chosen.dtype}.")
    if next_row is not None and (next_row.shape != (rows,) or next_row.dtype != torch.bool):
        raise UserError(f"{NAME}: next_row has to be [N] bool, not {tuple(next_row.shape)} {next_row.dtype}.")


def _refuse_gradient_to_head(hidden: Tensor, head: Head) -> None:
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return
    for tensor in (head.weight, head.bias, head.lora_a, head.lora_b):
        if tensor is not None and tensor.requires_grad:
            raise UserError(f"{NAME}: the head gets no gradient here: detach its tensors (head_weights does).")
