"""The walk over the vocabulary: one slice of logits for all rows at a time, in float32 and in a bounded workspace.

The head's weight is read once, whatever the number of rows. What is done with a slice is the backend's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats.gradient import Coefficients
from rl_lvr.ops.vocab_stats.partial import Partial, empty, rows_of, stack_rows

ALIGNS = (4096, 128)
"""A slice's width is a multiple of one of these: sums over blocks then do not depend on the number of rows."""
MIN_WIDTH = 1024
"""Rows are split before a slice becomes narrower than this."""


@dataclass(frozen=True)
class Head:
    """An output head: z = h W^T + scaling (h A^T) B^T + bias."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    lora_a: Tensor | None = None
    """[r, H]"""
    lora_b: Tensor | None = None
    """[V, r]"""
    scaling: float = 1.0


@dataclass(frozen=True)
class Slice:
    """Logits of ids `start` and following, before the bias and the temperature."""

    logits: Tensor
    """[N, C] float32 or float64; rows may be further apart than C."""
    start: int
    bias: Tensor | None
    """[C]"""
    temperature: float


Fold = Callable[[Partial, Slice, Tensor | None, Tensor | None], Partial]
"""(statistics so far, a slice, chosen [N] or None, next_row [N] or None) -> statistics with the slice."""
Differentiate = Callable[[Slice, Coefficients, Tensor], None]
"""(a slice, the gradient's coefficients, out [N, C]): writes dL/dlogits into `out`, which may be the slice's own."""


def accumulation_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    wide = torch.float64 in (hidden.dtype, head.weight.dtype)
    return torch.float64 if wide else torch.float32


def forward(
    hidden: Tensor,
    head: Head,
    fold: Fold,
    *,
    chosen: Tensor | None,
    next_row: Tensor | None,
    top_k: int,
    temperature: float,
    workspace_bytes: int,
    first_id: int = 0,
    keep: Tensor | None = None,
) -> Partial:
    """Statistics of all rows. `keep` [N, V] receives the logits themselves; `first_id` is the id of weight[0]."""
    dtype = accumulation_dtype(hidden, head)
    rows = len(hidden)
    most = max(1, workspace_bytes // (dtype.itemsize * MIN_WIDTH))
    parts = []
    for top in range(0, max(rows, 1), most):
        # One row more where it has a say in the divergence of the row before it.
        bottom = min(top + most + (next_row is not None), rows)
        block = slice(top, bottom)
        part = empty(bottom - top, top_k, hidden.device, dtype)
        source = _Logits(hidden[block], head, dtype, workspace_bytes, None if keep is None else keep[block], fill=True)
        for start, stop in source.ranges():
            piece = source.slice(start, stop, temperature, first_id)
            part = fold(part, piece, _rows(chosen, block), _rows(next_row, block))
        parts.append(rows_of(part, 0, min(most, rows - top)))
    return stack_rows(parts)


def backward(
    hidden: Tensor,
    head: Head,
    differentiate: Differentiate,
    coefficients: Coefficients,
    *,
    temperature: float,
    workspace_bytes: int,
    kept: Tensor | None,
) -> Tensor:
    """dL/dhidden [N, H] in the dtype of `hidden`, accumulated in float32. `kept` [N, V]: logits of the forward pass."""
    dtype = accumulation_dtype(hidden, head)
    rows = len(hidden)
    result = torch.zeros(hidden.shape, device=hidden.device, dtype=dtype)
    most = max(1, workspace_bytes // (dtype.itemsize * MIN_WIDTH))
    for top in range(0, rows, most):
        block = slice(top, min(top + most, rows))
        source = _Logits(hidden[block], head, dtype, workspace_bytes, None if kept is None else kept[block], fill=False)
        _accumulate(result[block], source, head, differentiate, coefficients.rows(block), temperature)
    return result.to(hidden.dtype)


def _accumulate(
    out: Tensor,
    source: _Logits,
    head: Head,
    differentiate: Differentiate,
    coefficients: Coefficients,
    temperature: float,
) -> None:
    """out += dL/dlogits W, and the same through the adapter."""
    rows = len(out)
    apart = source.half_gradient or source.store is not None
    gradient_dtype = torch.bfloat16 if source.half_gradient else out.dtype
    buffer = torch.empty(rows * source.width if apart else 0, device=out.device, dtype=gradient_dtype)
    inner = None
    if head.lora_b is not None:
        inner = torch.zeros(rows, head.lora_b.shape[1], device=out.device, dtype=out.dtype)
    for start, stop in source.ranges():
        piece = source.slice(start, stop, temperature, 0)
        gradient = buffer[: rows * (stop - start)].view(rows, -1) if apart else piece.logits
        differentiate(piece, coefficients, gradient)
        add_product(out, gradient, head.weight[start:stop])
        if inner is not None and head.lora_b is not None:
            add_product(inner, gradient, head.lora_b[start:stop])
    if inner is not None and head.lora_a is not None:
        add_product(out, inner * head.scaling, head.lora_a)


class _Logits:
    """Slices of the logits of some rows, in a workspace or in `store` [N, V], which is written if `fill`, else read."""

    def __init__(
        self, hidden: Tensor, head: Head, dtype: torch.dtype, workspace_bytes: int, store: Tensor | None, *, fill: bool
    ) -> None:
        self.hidden, self.head, self.store, self.fill = hidden, head, store, fill
        native = half_product(hidden, head.weight)
        # Where the GPU multiplies it with float32 sums; float16 would lose small probabilities.
        self.half_gradient = native and not fill and head.weight.dtype == torch.bfloat16
        rows, vocabulary = len(hidden), len(head.weight)
        per_id = dtype.itemsize * rows if store is None else 0
        if self.half_gradient:
            per_id += head.weight.element_size() * rows  # apart from the logits
        elif head.weight.dtype != dtype and not (native and fill):
            per_id += dtype.itemsize * head.weight.shape[1]  # a wider copy of the slice's weights
        fits = workspace_bytes // per_id if per_id else vocabulary
        align = next((a for a in ALIGNS if a <= fits), ALIGNS[-1])
        self.width = min(vocabulary, max(fits // align, 1) * align)
        self.workspace = torch.empty(rows * self.width if store is None else 0, device=hidden.device, dtype=dtype)
        if not native:
            self.hidden = hidden.to(dtype)
        self.inner = None
        if head.lora_a is not None and head.lora_b is not None:
            inner = torch.zeros(rows, len(head.lora_a), device=hidden.device, dtype=dtype)
            add_product(inner, hidden, head.lora_a.T)
            self.inner = inner * head.scaling
            if half_product(hidden, head.lora_b):
                self.inner = self.inner.to(head.lora_b.dtype)

    def ranges(self) -> Iterator[tuple[int, int]]:
        vocabulary = len(self.head.weight)
        for start in range(0, vocabulary, self.width):
            yield start, min(start + self.width, vocabulary)

    def slice(self, start: int, stop: int, temperature: float, first_id: int) -> Slice:
        rows = len(self.hidden)
        if self.store is None:
            logits = self.workspace[: rows * (stop - start)].view(rows, stop - start)
        else:
            logits = self.store[:, start:stop]
        if self.store is None or self.fill:
            set_product(logits, self.hidden, self.head.weight[start:stop].T)
            if self.inner is not None and self.head.lora_b is not None:
                add_product(logits, self.inner, self.head.lora_b[start:stop].T)
        bias = None if self.head.bias is None else self.head.bias[start:stop].to(logits.dtype)
        return Slice(logits, first_id + start, bias, temperature)


def half_product(a: Tensor, b: Tensor) -> bool:
    """Whether a GPU multiplies `a` and `b` as they are, 16 bits each, with float32 sums and a float32 result."""
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)


def set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed and kept in the dtype of `out`."""
    if half_product(a, b):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed and kept in the dtype of `out`."""
    if half_product(a, b):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _rows(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]
