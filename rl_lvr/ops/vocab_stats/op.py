"""The operator `rl_lvr::vocab_stats`: registered with torch, with its shapes and its gradient to the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.ops.backends import choose
from rl_lvr.ops.vocab_stats import sweep, torch_rows
from rl_lvr.ops.vocab_stats.gradient import coefficients
from rl_lvr.ops.vocab_stats.partial import Partial
from rl_lvr.ops.vocab_stats.stats import values_of
from rl_lvr.ops.vocab_stats.sweep import Head

NAME = "vocab_stats"
VALUES = 9
SUMS = 4


def folding(hidden: Tensor, weight: Tensor, asked: str) -> tuple[sweep.Fold, sweep.Differentiate]:
    """Chosen inside the operators: torch.compile cannot trace the look for Triton."""
    backend = choose(NAME, hidden.device, torch.promote_types(hidden.dtype, weight.dtype), asked)
    if backend == "torch":
        return torch_rows.fold, torch_rows.differentiate
    if backend == "triton":
        # Triton decides on import whether its kernels are interpreted, and is not installed everywhere.
        from rl_lvr.ops.vocab_stats.triton_rows import differentiate, fold

        return fold, differentiate
    raise UserError(f"{NAME}: backend {backend} needs the whole vocabulary at once: pass backend='torch'.")


@torch.library.custom_op("rl_lvr::vocab_stats", mutates_args=())
def vocab_stats_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    chosen: Tensor | None,
    next_row: Tensor | None,
    top_k: int,
    temperature: float,
    workspace_bytes: int,
    keep_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values [9, N] as `stats.values_of` has them, argmax [N], top ids [N, k], sums [4, N] for the gradient
    (maximum, rest, moment, square), logits [N, V] if kept, else [0, V]."""
    head = Head(weight, bias, lora_a, lora_b, scaling)
    if chosen is not None:
        valid = ((chosen >= 0) & (chosen < len(weight))).all()
        torch._assert_async(valid, "vocab_stats: a chosen id is not in the vocabulary")
    dtype = sweep.accumulation_dtype(hidden, head)
    logits = hidden.new_empty(len(hidden) if keep_logits else 0, len(weight), dtype=dtype)
    part = sweep.forward(
        hidden,
        head,
        folding(hidden, weight, backend)[0],
        chosen=chosen,
        next_row=next_row,
        top_k=top_k,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
        keep=logits if keep_logits else None,
    )
    sums = torch.stack([part.maximum, part.rest, part.moment, part.square])
    return values_of(part, next_row), part.argmax, part.top_ids, sums, logits


@vocab_stats_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    chosen: Tensor | None,
    next_row: Tensor | None,
    top_k: int,
    temperature: float,
    workspace_bytes: int,
    keep_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    dtype = sweep.accumulation_dtype(hidden, Head(weight))
    return (
        hidden.new_empty(VALUES, rows, dtype=dtype),
        hidden.new_empty(rows, dtype=torch.int64),
        hidden.new_empty(rows, top_k, dtype=torch.int64),
        hidden.new_empty(SUMS, rows, dtype=dtype),
        hidden.new_empty(rows if keep_logits else 0, weight.shape[0], dtype=dtype),
    )


@torch.library.custom_op("rl_lvr::vocab_stats_backward", mutates_args=())
def vocab_stats_backward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    chosen: Tensor | None,
    argmax: Tensor,
    top_ids: Tensor,
    sums: Tensor,
    logits: Tensor,
    wanted: Tensor,
    temperature: float,
    workspace_bytes: int,
    backend: str,
) -> Tensor:
    """dL/dhidden [N, H], from `wanted` [9, N], dL/dvalues, and what the forward operator returned."""
    maximum, rest, moment, square = sums.unbind()
    nothing = torch.empty_like(maximum)
    part = Partial(maximum, argmax, rest, moment, square, nothing, top_ids, nothing, nothing, nothing)
    return sweep.backward(
        hidden,
        Head(weight, bias, lora_a, lora_b, scaling),
        folding(hidden, weight, backend)[1],
        coefficients(part, chosen, wanted, temperature),
        temperature=temperature,
        workspace_bytes=workspace_bytes,
        kept=logits if len(logits) else None,
    )


@vocab_stats_backward_op.register_fake
def _(hidden: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(hidden)


def _setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, lora_a, lora_b, scaling, chosen, _, _, temperature, workspace_bytes, _, backend = inputs
    _, argmax, top_ids, sums, logits = output
    ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, chosen, argmax, top_ids, sums, logits)
    ctx.scaling, ctx.rest = scaling, (temperature, workspace_bytes, backend)
    ctx.mark_non_differentiable(argmax, top_ids, sums, logits)


def _backward(ctx: Any, wanted: Tensor, *ignored: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, lora_a, lora_b, chosen, argmax, top_ids, sums, logits = ctx.saved_tensors
    gradient = torch.ops.rl_lvr.vocab_stats_backward(
        hidden, weight, bias, lora_a, lora_b, ctx.scaling, chosen, argmax, top_ids, sums, logits, wanted, *ctx.rest
    )
    return (gradient, *[None] * 12)


vocab_stats_op.register_autograd(_backward, setup_context=_setup)
