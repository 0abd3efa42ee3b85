"""Around vLLM's sampler, the two logits of the decision to end a span, and what a cut keeps.

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
        # vLLM's own call, with this object as its `self`: so it comes to `sample` below.
        output = type(self._base).__call__(self, logits, input_batch)
        self._state.after_sampling(output, input_batch, self._base.req_states.prefill_len.gpu)
        return output

    def sample(self, logits: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """The only place where the logits before and after penalties and filters are both there.

        A bias on START stands in its column while vLLM draws, and what stood there before comes back exactly.
        """
        bias, start = self._state.start_bias(), self._state.settings.markers.start
        if bias is None:
            sampled, processed = self._base.sample(logits, *args, **more)
            self._state.after_filters(logits, processed, sampled)
            return sampled, processed
        column = logits[:, start]
        unbiased = column.clone()
        column.add_(bias)
        biased = column.clone()
        sampled, processed = self._base.sample(logits, *args, **more)
        column.copy_(unbiased)
        self._state.after_filters(logits, processed, sampled)
        if processed.data_ptr() == logits.data_ptr():  # no copy where no request changes its logits
            column.copy_(biased)  # vLLM takes the log-probs of the draw from here
        return sampled, processed


def write_over(output: Any, rows: Tensor, token: Tensor, logprobs: Tensor) -> None:
    """Put `token` and its log-prob into vLLM's sampler output where `rows` says so, in place."""
    sampled = output.sampled_token_ids[:, 0]
    sampled.copy_(torch.where(rows, token, sampled))
    scores = output.logprobs_tensors
    if scores is None:
        return
    first = scores.logprob_token_ids[:, 0]
    first.copy_(torch.where(rows, token, first))
    if scores.logprobs.shape[1] > 1:
        scores.logprobs[:, 1:].masked_fill_(rows[:, None], float("-inf"))
    scores.logprobs[:, 0].copy_(torch.where(rows, logprobs, scores.logprobs[:, 0]))
    scores.selected_token_ranks.masked_fill_(rows, 1)


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


@triton.jit
def _uncut_kernel(
    output_ptr: Any,
    logits_ptr: Any,
    logits_stride: Any,
    processed_ptr: Any,
    processed_stride: Any,
    temperature_ptr: Any,
    wanted_ptr: Any,
    sampled_ptr: Any,
    vocabulary: Any,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Row by row, in one pass: the sampled token's log-prob in the whole softmax, and the log of the mass that is kept.

    Both sums are made in the same order, so they are equal where nothing was dropped.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wanted_ptr + row) == 0:
        return
    row_ptr = logits_ptr + row * logits_stride
    kept_ptr = processed_ptr + row * processed_stride
    temperature = tl.load(temperature_ptr + row)
    most = float("-inf")
    most_kept = float("-inf")
    total = 0.0
    kept = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32) / temperature
        y = tl.load(kept_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        left = tl.where(y > float("-inf"), x, float("-inf"))
        higher = tl.maximum(most, tl.max(x))
        finite = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(most - finite) + tl.sum(tl.exp(x - finite))
        most = higher
        higher = tl.maximum(most_kept, tl.max(left))
        finite = tl.where(higher > float("-inf"), higher, 0.0)
        kept = kept * tl.exp(most_kept - finite) + tl.sum(tl.exp(left - finite))
        most_kept = higher
    total = most + tl.log(total)
    token = tl.load(sampled_ptr + row)
    tl.store(output_ptr + row * 2, tl.load(row_ptr + token).to(tl.float32) / temperature - total)
    tl.store(output_ptr + row * 2 + 1, tl.minimum(most_kept + tl.log(kept) - total, 0.0))


def score_uncut(
    logits: Tensor, processed: Tensor, temperature: Tensor, wanted: Tensor, sampled: Tensor, output: Tensor
) -> None:
    """`rollout.sampling.uncut` of the rows `wanted` [N], written into `output` [N, 2] float32.

    `logits` [N, V] are those before penalties and temperature, `processed` those that `sampled` [N] was drawn from.
    """
    _uncut_kernel[(len(logits),)](
        output,
        logits,
        logits.stride(0),
        processed,
        processed.stride(0),
        torch.where(temperature == 0, 1.0, temperature),
        wanted.to(torch.int8),
        sampled,
        logits.shape[1],
        BLOCK=1024,
    )
