"""What the tests of exactness share: requests that collide in a small KV cache, engines under stress, eyes inside.

The eyes look at what happened (chunks, preemptions, cache hits), because a condition that did not arise proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import noise_image
from vllm_cases import VLLMRig, opened

from rl_lvr.latents.format import LatentFormat
from rl_lvr.latents.starting import LatentStart
from rl_lvr.models import family_of
from rl_lvr.rollout.types import Request, Rollout, Sampling

ROWS = (
    ([noise_image(0)], "from red 3 hops what is next 1 2"),
    ([], "what is next from blue 3 hops what is next from green 2 hops"),
    ([noise_image(1, 84, 56), noise_image(2, 56, 56)], "from blue 1 hops"),
    ([], "green 2 hops from blue what is next from red 1 hops what is red"),
    ([noise_image(4)], "what is next from red 2 hops"),
)
"""Prompts of 22 to 25 tokens: each starts with one block of 32 and soon needs a second."""
GREEDY = Sampling(max_tokens=16, temperature=0.0)
NOISY = Sampling(max_tokens=16, temperature=1.0, top_k=200, seed=7, sigma=0.3)
ROOMY = {"max_num_batched_tokens": 512, "num_gpu_blocks_override": 64}
TIGHT = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 6}
"""Prompts arrive in pieces, and of five requests that need two blocks each, five blocks hold two and a half."""


def start(rig: VLLMRig, format_: LatentFormat, room: dict[str, int], *, cache: bool, **more: Any) -> Any:
    """A vLLM engine with blocks of 32, with or without the prefix cache."""
    arguments = {**room, "block_size": 32, "enable_prefix_caching": cache, **more.pop("engine_args", {})}
    return rig.vllm(format_, engine_args=arguments, **{"max_model_len": 64, **more})


def forced_async(patch: Any) -> None:
    """vLLM turns async scheduling off on a CPU, where it would gain nothing. `patch` is a MonkeyPatch."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls: Any, config: Any) -> None:
        stock(cls, config)
        config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_async))


def five_requests(rig: VLLMRig, start_id: int) -> list[Request]:
    """Two prompts end in START; of the others one is made to begin with it, and one has a bias on it."""
    requests = opened(rig.requests(ROWS), start_id)
    for row, start in ((0, "forced"), (2, "bias 1.5")):
        requests[row] = replace(requests[row], latent_start=LatentStart.parse(start))
    return requests


def alone(engine: Any, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
    """Each request in a batch of its own, with the seed that it has among the others."""
    rollouts = []
    for i, request in enumerate(requests):
        engine.llm.reset_prefix_cache()
        rollouts += engine.generate([replace(request, seed=sampling.seed + i)], sampling)
    return rollouts


@contextmanager
def changed(model: Any) -> Iterator[Any]:
    """The model with other keys in its first layer."""
    weight = family_of(model).text_layers(model)[0].self_attn.k_proj.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.neg_()
        yield model
    finally:
        with torch.no_grad():
            weight.copy_(before)


def forget(state: Any) -> None:
    """What a deep sleep leaves of device memory on a GPU (on a CPU vLLM does not sleep at all): anything."""
    tables = [*vars(state.tables).values(), *vars(state.tables.span).values(), state._banned, state._pairs]
    for tensor in (table for table in tables if isinstance(table, torch.Tensor)):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


def without_restoring(patch: Any) -> None:
    """A negative control: what a prefill should get in place of embeddings is not written. `patch`: a MonkeyPatch."""
    from rl_lvr.rollout.vllm.state import LatentModelState

    patch.setattr(LatentModelState, "_write_planted", lambda self, embeds, batch: None)


def identical(left: Sequence[Rollout], right: Sequence[Rollout], *, rounding: bool = False) -> bool:
    """Bit by bit: tokens, log-probs, latents and what is said about them.

    `rounding`: numbers within 1e-5 relative will do. A request that comes back from a preemption computes its last
    position in a prefill and not in a decode step, and on some CPUs the two kernels differ by one bit.
    """

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        close = rounding and one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=2e-6)
        return close or torch.equal(one, other)

    return all(
        a.ids == b.ids
        and a.latent_positions == b.latent_positions
        and a.stop_reason == b.stop_reason
        and torch.equal(a.forced, b.forced)
        and equal(a.logprobs, b.logprobs)
        and equal(a.uncut_logprobs, b.uncut_logprobs)
        and equal(a.log_kept_mass, b.log_kept_mass)
        and equal(a.latents, b.latents)
        for a, b in zip(left, right, strict=True)
    )


@dataclass
class Seen:
    """What happened while somebody watched."""

    chunks: int = 0
    """Rows of a step that ended before their prefill did."""
    cached: int = 0
    """Tokens that came out of the prefix cache."""
    prefilled: int = 0
    """Tokens of prompts that did not, of requests that came back from a preemption all over again."""
    resumed: int = 0
    """Requests that came back from a preemption."""
    restored: int = 0
    """Latents written back over the embeddings, those of prompts included."""


def scheduler(engine: Any) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def latent_state(engine: Any) -> Any:
    executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.model_runner.model_state


def counters(engine: Any) -> dict[str, int]:
    """Of the first worker, in whatever process."""
    return dict(engine.llm.collective_rpc("latent_status")[0]["counters"])


@contextmanager
def eyes(engine: Any) -> Iterator[Seen]:
    """Watch an engine whose worker lives in this process."""
    state, seen, before = latent_state(engine), Seen(), counters(engine)
    add, embed = state.add_request, state.prepare_inputs_embeds

    def add_request(slot: int, data: Any) -> None:
        seen.cached += data.num_computed_tokens
        seen.prefilled += max(len(data.prompt_token_ids) - data.num_computed_tokens, 0)
        add(slot, data)

    def prepare_inputs_embeds(encoder_inputs: Any, batch: Any, requests: Any) -> torch.Tensor:
        reached = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        seen.chunks += int((reached < batch.prefill_len_np).sum())
        return embed(encoder_inputs, batch, requests)

    state.add_request, state.prepare_inputs_embeds = add_request, prepare_inputs_embeds
    try:
        yield seen
    finally:
        del state.add_request, state.prepare_inputs_embeds
        after = counters(engine)
        seen.resumed = after["resumed"] - before["resumed"]
        seen.restored = after["planted_rows"] - before["planted_rows"]


@contextmanager
def victims(engine: Any, prompts: Sequence[Sequence[int]], steps: int, k: int) -> Iterator[None]:
    """More requests in the batch of the next call, with spans of `k`; aborted when it has made some steps.

    Prompts that end in START are in the middle of a span then.
    """
    from vllm import SamplingParams

    core, params = engine.llm.llm_engine, SamplingParams(max_tokens=2 * k, seed=1, extra_args={"latent_k": k})
    ids = engine.llm.enqueue([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    theirs = {name.rpartition("-")[0] for name in ids}  # vLLM adds eight characters inside
    step, left = core.step, steps

    def counting_step() -> list[Any]:
        nonlocal left
        left -= 1
        if left == 0:
            core.abort_request(ids, internal=True)
        return [output for output in step() if output.request_id not in theirs]

    core.step = counting_step
    try:
        yield
    finally:
        del core.step
        core.abort_request(ids, internal=True)
