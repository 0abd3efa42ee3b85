"""The log-sum-exp that an attention kernel computes anyway, taken while it runs.

The model's own attention function is called unchanged, so the kernel, its mask and its output are the same with and
without. Its result is seen on the way out, below autograd: no second call, no copy of transformers' dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rl_lvr.ops.attention_mass import log_sum_exp

COMPOSITE = "aten::scaled_dot_product_attention"
EFFICIENT = "aten::_scaled_dot_product_efficient_attention"
LSE_KERNELS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    EFFICIENT,
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "torch_attn::_varlen_attn",
)
"""Kernels whose second result is the log-sum-exp."""
COMPUTE_LSE = 4  # position of EFFICIENT's compute_log_sumexp, which is false without gradients

_checked: set[tuple[str, torch.dtype, str]] = set()


@dataclass(frozen=True)
class Kernel:
    """The attention kernel that ran."""

    name: str
    dtype: torch.dtype
    """Precision of the queries that it was given, which autocast may have changed."""
    lse: Tensor
    """Natural log-sum-exp as the kernel lays it out."""


class Watch(TorchDispatchMode):
    """Sees the kernels that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name == COMPOSITE:  # whole under inference_mode; elsewhere autograd has taken it apart already
            with self:
                return func.decompose(*args, **kwargs)
        if name == EFFICIENT:
            args = (*args[:COMPUTE_LSE], True, *args[COMPUTE_LSE + 1 :])
        result = func(*args, **kwargs)
        if name in LSE_KERNELS and result[1].numel():
            self.kernels.append(Kernel(name, args[0].dtype, result[1]))
        return result


def watched(attention: Callable[[], Any]) -> tuple[Any, Kernel | None]:
    """What `attention` returns, and the kernel that it ran; None if that kernel gives no log-sum-exp."""
    with Watch() as watch:
        result = attention()
    if len(watch.kernels) > 1:
        raise RuntimeError(f"one attention call ran {len(watch.kernels)} kernels: {[k.name for k in watch.kernels]}.")
    return result, watch.kernels[0] if watch.kernels else None


def dense_lse(kernel: Kernel, shape: tuple[int, int, int], valid: Tensor | None) -> Tensor:
    """The kernel's log-sum-exp as [B, H, T] = `shape`. `valid` [B, T] marks the tokens of a call without padding."""
    lse = kernel.lse
    rows, heads, tokens = shape
    if lse.dim() == 2:  # [H, total], the tokens of all sequences one after another
        if valid is None:
            return lse.view(heads, rows, tokens).transpose(0, 1)
        dense = lse.new_zeros(rows, tokens, heads)
        dense[valid] = lse.t()
        return dense.permute(0, 2, 1)
    if lse.dim() == 4:
        lse = lse[..., 0]
    return lse[..., :tokens]  # the efficient kernel rounds the length up


def check_lse(
    kernel: Kernel, lse: Tensor, query: Tensor, key: Tensor, row: tuple[int, int], segments: Tensor | None, **how: Any
) -> None:
    """Once per kernel, precision and device: the log-sum-exp `lse` [B, H, T] of one query `row` (b, t) is what we mean.

    Kernels have disagreed about base 2 and base e, and about layouts, without an error: the masses would only be wrong.
    """
    case = (kernel.name, kernel.dtype, query.device.type)
    if case in _checked:
        return
    b, t = row
    here = slice(t, t + 1), slice(0, t + 1)
    ours = log_sum_exp(
        query[b : b + 1, :, here[0]],
        key[b : b + 1, :, here[1]],
        segments=None if segments is None else segments[b : b + 1, here[1]],
        **how,
    )
    theirs = lse[b, :, t].float()
    difference = float((ours.flatten().float() - theirs).abs().max())
    if not difference <= 1e-2:
        raise RuntimeError(
            f"attention kernel {kernel.name} reports a log-sum-exp that differs from ours by {difference:.3g} nats: "
            "measure with recompute=True, which does not ask the kernel, and report it with the version of torch."
        )
    _checked.add(case)
