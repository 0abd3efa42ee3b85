"""The start-up check: a planted latent must reach the model in every worker, and change what comes out.

The worst fault of a latent engine is that nothing is fed and nobody notices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rl_lvr.errors import UserError
from rl_lvr.rollout.types import Request
from rl_lvr.rollout.vllm import wire
from rl_lvr.rollout.vllm.settings import LatentSettings


def run(llm: Any, settings: LatentSettings) -> None:
    """Three tiny requests: a vector, another one, and the first again."""
    vectors = torch.randn(2, settings.limits.hidden_size, generator=torch.Generator().manual_seed(0))
    before = _planted(llm)
    one, two, again = (_hidden(llm, settings, vectors[i]) for i in (0, 1, 0))
    rows = [now - then for now, then in zip(_planted(llm), before, strict=True)]
    for rank, planted in enumerate(rows):
        change = float(np.abs(one[rank] - two[rank]).max())
        noise = float(np.abs(one[rank] - again[rank]).max())
        if planted != 3 or not change > 10 * noise or not np.isfinite(change):
            raise UserError(
                f"latents do not reach the model in vLLM's worker {rank}: {planted} of 3 planted vectors were written, "
                f"and the hidden state moved by {change:.3g} (by {noise:.3g} without a cause). Report this with vLLM's "
                "version and engine arguments."
            )


def _planted(llm: Any) -> list[int]:
    return [row["counters"]["planted_rows"] for row in llm.collective_rpc("latent_status")]


def _hidden(llm: Any, settings: LatentSettings, vector: torch.Tensor) -> list[np.ndarray]:
    """The hidden state behind the planted vector, from every worker."""
    from vllm import SamplingParams

    markers = settings.markers
    avoided = {*settings.limits.special_ids, *markers.never_sampled, markers.start}
    ids = [next(i for i in range(settings.limits.vocabulary) if i not in avoided)]
    if markers.start is not None:
        ids.append(markers.start)
    if markers.format.first == "at_start":
        ids.append(markers.slot)
    request = Request(ids, prompt_latents=(vector[None], [len(ids) - 1]), k=1)
    params = SamplingParams(
        max_tokens=1, temperature=0.0, seed=0, detokenize=False, extra_args=wire.encode(wire.LatentArgs(request))
    )
    llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    return [np.frombuffer(row, np.float32) for row in llm.collective_rpc("latent_hidden")]
