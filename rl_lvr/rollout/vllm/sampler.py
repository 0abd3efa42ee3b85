"""Around vLLM's sampler, and the two logits of the decision to end a span.

vLLM draws a token for every row; `LatentModelState` then writes over the rows whose token is not vLLM's to choose.
So no logits-sized tensor is ever made here, and no filter or penalty of a request reaches into a span.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton


class LatentSampler:
    """vLLM's sampler between the two steps of a latent state; all else is passed through."""

    def __init__(self, base: Any, state: Any) -> None:
        self.__dict__.update(_base=base, _state=state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._base, name, value)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        self._state.before_sampling(logits, input_batch)
        output = self._base(logits, input_batch)
        self._state.after_sampling(output, input_batch, self._base.req_states.prefill_len.gpu)
        return output


@triton.jit
def _end_or_rest_kernel(
    output_ptr: Any,
    logits_ptr: Any,
    logits_stride: Any,
    inside_ptr: Any,
    end: Any,
    vocabulary: Any,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Row by row: END's logit, and the logsumexp of all others in one pass. Rows outside a span cost nothing."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(inside_ptr + row) == 0:
        return
    row_ptr = logits_ptr + row * logits_stride
    most = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = (at < vocabulary) & (at != end)
        x = tl.load(row_ptr + at, mask=kept, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - higher) + tl.sum(tl.where(kept, tl.exp(x - higher), 0.0))
        most = higher
    tl.store(output_ptr + row * 2, tl.load(row_ptr + end).to(tl.float32))
    tl.store(output_ptr + row * 2 + 1, most + tl.log(total))


def end_or_rest(logits: Tensor, inside: Tensor, end: int, output: Tensor) -> None:
    """`rollout.sampling.end_or_not` of the rows `inside` [N], written into `output` [N, 2] float32."""
    _end_or_rest_kernel[(len(logits),)](
        output, logits, logits.stride(0), inside.to(torch.int8), end, logits.shape[1], BLOCK=1024
    )
