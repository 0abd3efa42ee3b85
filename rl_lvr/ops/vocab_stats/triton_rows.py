"""One slice of logits in Triton, one program per row: folded into the statistics, or turned into their gradient.

The logits come from a matrix product in the workspace, always float32, so no kernel here multiplies matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rl_lvr.ops.backends import KernelExample
from rl_lvr.ops.vocab_stats import partial
from rl_lvr.ops.vocab_stats.gradient import Coefficients
from rl_lvr.ops.vocab_stats.partial import Partial
from rl_lvr.ops.vocab_stats.sweep import Slice

EMPTY = tl.constexpr(partial.EMPTY)
FLOOR = tl.constexpr(partial.FLOOR)
FAR = tl.constexpr(1 << 30)
"""Beyond every id inside a slice."""

FOLD_BLOCK, FOLD_BLOCK_FULL, FOLD_WARPS = 4096, 2048, 8  # the smaller where top-k or the next row need registers too
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 8


@triton.jit
def load_logits(
    row_at: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    inside: tl.tensor,
    temperature: tl.tensor,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    HAS_TEMPERATURE: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """A tile of logits, -inf outside."""
    z = tl.load(row_at + ids, mask=inside, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias + ids, mask=inside, other=0.0)
    if HAS_TEMPERATURE:
        z = tl.div_rn(z, temperature)
    return z


@triton.jit
def fold_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    bias: tl.tensor,
    chosen: tl.tensor,
    next_row: tl.tensor,
    maximum: tl.tensor,
    argmax: tl.tensor,
    rest: tl.tensor,
    moment: tl.tensor,
    square: tl.tensor,
    top_values: tl.tensor,
    top_ids: tl.tensor,
    picked: tl.tensor,
    next_maximum: tl.tensor,
    cross: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    temperature: tl.tensor,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    HAS_TEMPERATURE: tl.constexpr,  # noqa: N803
    HAS_CHOSEN: tl.constexpr,  # noqa: N803
    HAS_NEXT: tl.constexpr,  # noqa: N803
    TOP_K: tl.constexpr,  # noqa: N803
    TOP_BLOCK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Adds the ids `start` to `start + width` to a row's `Partial`, in place."""
    row = tl.program_id(0).to(tl.int64)
    row_at = logits + row * stride
    m = tl.load(maximum + row)
    a = tl.load(argmax + row)
    s = tl.load(rest + row)
    u = tl.load(moment + row)
    q = tl.load(square + row)
    if HAS_NEXT:
        follows = tl.where(row + 1 < rows, tl.load(next_row + row), 0) != 0
        next_width = tl.where(follows, width, 0)
        nm = tl.load(next_maximum + row)
        cx = tl.load(cross + row)
    if TOP_K > 0:
        places = tl.arange(0, TOP_BLOCK)
        real = places < TOP_K
        # Places that are there only to fill a power of two are never the smallest.
        tv = tl.load(top_values + row * TOP_K + places, mask=real, other=float("inf"))
        ti = tl.load(top_ids + row * TOP_K + places, mask=real, other=0)
    if HAS_CHOSEN:
        local = tl.load(chosen + row) - start
        here = (local >= 0) & (local < width)
        tl.store(
            picked + row, load_logits(row_at, bias, local, here, temperature, HAS_BIAS, HAS_TEMPERATURE), mask=here
        )

    for at in range(0, width, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        inside = ids < width
        z = load_logits(row_at, bias, ids, inside, temperature, HAS_BIAS, HAS_TEMPERATURE)
        best = tl.max(z, axis=0)
        tile_m = tl.maximum(best, EMPTY)
        hit = z == tile_m
        y = tl.where(z == float("-inf"), FLOOR, z - tile_m)
        e = tl.exp(y)
        others = tl.where(hit, 0.0, e)
        more = tl.sum(hit.to(tl.float32), axis=0) - 1.0  # equals of the maximum; -1 for a tile without a finite logit
        tile_s = tl.sum(others, axis=0) + more
        tile_u = tl.sum(others * y, axis=0)
        tile_q = tl.sum(others * others, axis=0) + more
        new_m = tl.maximum(m, tile_m)
        if HAS_NEXT:
            zn = load_logits(row_at + stride, bias, ids, ids < next_width, temperature, HAS_BIAS, HAS_TEMPERATURE)
            tile_nm = tl.maximum(tl.max(zn, axis=0), EMPTY)
            tile_cx = tl.sum(tl.where(e > 0, e * (zn - tile_nm), 0.0), axis=0)
            new_nm = tl.maximum(nm, tile_nm)
            scale = tl.exp(m - new_m)
            tile_scale = tl.exp(tile_m - new_m)
            cx = tl.where(scale > 0, scale * (cx + (nm - new_nm) * (1.0 + s)), 0.0)
            cx += tl.where(tile_scale > 0, tile_scale * (tile_cx + (tile_nm - new_nm) * (1.0 + tile_s)), 0.0)
            nm = new_nm
        wins = tile_m > m
        gap = -tl.abs(tile_m - m)
        r = tl.exp(gap)
        lost_s = tl.where(wins, s, tile_s)
        lost_u = tl.where(wins, u, tile_u)
        lost_q = tl.where(wins, q, tile_q)
        s = tl.where(wins, tile_s, s) + r * (1.0 + lost_s)
        u = tl.where(wins, tile_u, u) + r * (lost_u + gap * (1.0 + lost_s))
        q = tl.where(wins, tile_q, q) + r * r * (1.0 + lost_q)
        a = tl.where(wins, start + tl.min(tl.where(hit, ids, FAR), axis=0).to(tl.int64), a)
        m = new_m
        if TOP_K > 0:
            smallest = tl.min(tv, axis=0)
            while best > smallest:
                place = tl.min(tl.where(z == best, ids, FAR), axis=0)
                replaced = tl.min(tl.where(tv == smallest, places, TOP_BLOCK), axis=0)
                tv = tl.where(places == replaced, best, tv)
                ti = tl.where(places == replaced, start + place.to(tl.int64), ti)
                z = tl.where(ids == place, float("-inf"), z)
                smallest = tl.min(tv, axis=0)
                best = tl.max(z, axis=0)

    tl.store(maximum + row, m)
    tl.store(argmax + row, a)
    tl.store(rest + row, s)
    tl.store(moment + row, u)
    tl.store(square + row, q)
    if HAS_NEXT:
        tl.store(next_maximum + row, tl.where(follows, nm, EMPTY))
        tl.store(cross + row, tl.where(follows, cx, 0.0))
    if TOP_K > 0:
        tl.store(top_values + row * TOP_K + places, tv, mask=real)
        tl.store(top_ids + row * TOP_K + places, ti, mask=real)


@triton.jit
def gradient_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    bias: tl.tensor,
    numbers: tl.tensor,
    argmax: tl.tensor,
    chosen: tl.tensor,
    top_ids: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    temperature: tl.tensor,
    HAS_BIAS: tl.constexpr,  # noqa: N803
    HAS_TEMPERATURE: tl.constexpr,  # noqa: N803
    TOP_K: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """dL/dlogits of one row and block; `numbers` [10, N] are the floats of `Coefficients`."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < width
    maximum = tl.load(numbers + row)
    inverse = tl.load(numbers + rows + row)
    linear = tl.load(numbers + 2 * rows + row)
    entropy = tl.load(numbers + 3 * rows + row)
    mean = tl.load(numbers + 4 * rows + row)
    renyi = tl.load(numbers + 5 * rows + row)
    ratio = tl.load(numbers + 6 * rows + row)
    chosen_weight = tl.load(numbers + 7 * rows + row)
    top_weight = tl.load(numbers + 8 * rows + row)
    at_top = tl.load(numbers + 9 * rows + row)
    z = load_logits(logits + row * stride, bias, ids, inside, temperature, HAS_BIAS, HAS_TEMPERATURE)
    y = tl.where(z == float("-inf"), FLOOR, z - maximum)
    e = tl.exp(y)
    gradient = inverse * e * (linear + entropy * (mean - y) + renyi * (1.0 - ratio * e))
    here = start + ids
    gradient += tl.where(here == tl.load(chosen + row), chosen_weight, 0.0)
    for place in tl.static_range(TOP_K):
        gradient += tl.where(here == tl.load(top_ids + row * TOP_K + place), top_weight, 0.0)
    gradient = tl.where(here == tl.load(argmax + row), at_top, gradient)
    tl.store(out + row * out_stride + ids, gradient.to(out.dtype.element_ty), mask=inside)


def fold(part: Partial, piece: Slice, chosen: Tensor | None, next_row: Tensor | None) -> Partial:
    """`part`, changed in place, and the statistics of `piece`; see `sweep.Fold`."""
    rows, width = piece.logits.shape
    if not rows:
        return part
    top_k = part.top_values.shape[1]
    unused = part.maximum
    widest = FOLD_BLOCK_FULL if top_k or next_row is not None else FOLD_BLOCK
    fold_kernel[(rows,)](
        piece.logits,
        piece.logits.stride(0),
        unused if piece.bias is None else piece.bias,
        part.argmax if chosen is None else chosen.contiguous(),
        part.argmax if next_row is None else next_row.to(torch.int8),
        part.maximum,
        part.argmax,
        part.rest,
        part.moment,
        part.square,
        part.top_values,
        part.top_ids,
        part.chosen,
        part.next_maximum,
        part.cross,
        rows,
        width,
        piece.start,
        piece.temperature,
        HAS_BIAS=piece.bias is not None,
        HAS_TEMPERATURE=piece.temperature != 1.0,
        HAS_CHOSEN=chosen is not None,
        HAS_NEXT=next_row is not None,
        TOP_K=top_k,
        TOP_BLOCK=triton.next_power_of_2(max(top_k, 1)),
        BLOCK=min(widest, triton.next_power_of_2(width)),
        num_warps=FOLD_WARPS,
    )
    return part


def differentiate(piece: Slice, coefficients: Coefficients, out: Tensor) -> None:
    """Writes dL/dlogits; see `sweep.Differentiate`."""
    rows, width = piece.logits.shape
    if not rows:
        return
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(width))
    gradient_kernel[(rows, triton.cdiv(width, block))](
        piece.logits,
        piece.logits.stride(0),
        coefficients.packed if piece.bias is None else piece.bias,
        coefficients.packed,
        coefficients.argmax,
        coefficients.chosen,
        coefficients.top_ids,
        out,
        out.stride(0),
        rows,
        width,
        piece.start,
        piece.temperature,
        HAS_BIAS=piece.bias is not None,
        HAS_TEMPERATURE=piece.temperature != 1.0,
        TOP_K=coefficients.top_ids.shape[1],
        BLOCK=block,
        num_warps=GRADIENT_WARPS,
    )


def _examples() -> tuple[KernelExample, ...]:
    fold_types = {
        **dict.fromkeys(("logits", "bias", "maximum", "rest", "moment", "square"), "*fp32"),
        **dict.fromkeys(("top_values", "picked", "next_maximum", "cross"), "*fp32"),
        **dict.fromkeys(("chosen", "argmax", "top_ids"), "*i64"),
        **dict.fromkeys(("stride", "rows", "width", "start"), "i32"),
        "next_row": "*i8",
        "temperature": "fp32",
    }
    gradient_types = {
        **dict.fromkeys(("logits", "bias", "numbers"), "*fp32"),
        **dict.fromkeys(("argmax", "chosen", "top_ids"), "*i64"),
        **dict.fromkeys(("stride", "out_stride", "rows", "width", "start"), "i32"),
        "out": "*bf16",
        "temperature": "fp32",
    }
    bare = {
        **dict.fromkeys(("HAS_BIAS", "HAS_TEMPERATURE", "HAS_CHOSEN", "HAS_NEXT"), False),
        "TOP_K": 0,
        "TOP_BLOCK": 1,
        "BLOCK": FOLD_BLOCK,
    }
    full = {
        **dict.fromkeys(("HAS_BIAS", "HAS_TEMPERATURE", "HAS_CHOSEN", "HAS_NEXT"), True),
        "TOP_K": 10,
        "TOP_BLOCK": 16,
        "BLOCK": FOLD_BLOCK_FULL,
    }

    def example(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> KernelExample:
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        used = {argument: constants[argument] for argument in kernel.arg_names if signature[argument] == "constexpr"}
        return KernelExample(name, kernel, signature, used, warps)

    gradient_block = {"BLOCK": GRADIENT_BLOCK}
    return (
        example("vocab_fold", fold_kernel, fold_types, bare, FOLD_WARPS),
        example("vocab_fold_all", fold_kernel, fold_types, full, FOLD_WARPS),
        example("vocab_gradient", gradient_kernel, gradient_types, {**bare, **gradient_block}, GRADIENT_WARPS),
        example("vocab_gradient_all", gradient_kernel, gradient_types, {**full, **gradient_block}, GRADIENT_WARPS),
    )


EXAMPLES = _examples()
"""What to compile ahead of time."""
