"""The other families under what happens inside vLLM: tokens, log-probs and latents stay the same.

One engine for each: async scheduling, the prefix cache, little room. `test_vllm_exactness.py` takes the conditions
apart on Qwen2.5-VL; here most of them come together. The undisturbed run is each request alone, with a cold cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch
from vllm_cases import VLLMRig, thinking
from vllm_conditions import (
    ROOMY,
    alone,
    changed,
    eyes,
    five_requests,
    forced_async,
    forget,
    identical,
    latent_state,
    scheduler,
    start,
    victims,
    without_restoring,
)

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.types import Request, Rollout, Sampling
from rl_lvr.rollout.vllm import prefix

NAMES = ("qwen3_vl", "internvl", "llava_onevision", "qwen2")
FORMAT = get_format("lvr", k=3)
GREEDY = Sampling(max_tokens=12, temperature=0.0)
NOISY = Sampling(max_tokens=12, temperature=1.0, seed=7, sigma=0.3)
BLOCK = 32
PIECE = 24
"""Tokens of a step when prompts come in pieces."""


@dataclass
class Case:
    """A family in an engine, its requests and what they became undisturbed."""

    rig: VLLMRig
    engine: Any
    requests: list[Request]
    truth: dict[Any, list[Rollout]]


def blocks(request: Request, more: int) -> int:
    return -(-(len(request.prompt_ids) + more) // BLOCK)


@pytest.fixture(scope="module")
def case(request, tiny_folder, tmp_path_factory):
    rig = VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("family"), request.param))
    requests = five_requests(rig, rig.engine(FORMAT).markers.start)
    largest = max(blocks(r, 2 * GREEDY.max_tokens) for r in requests)
    # All prompts have room, but not what comes after them: who is taken away has latents to lose. vLLM keeps one block.
    room = {**ROOMY, "num_gpu_blocks_override": sum(blocks(r, 0) for r in requests) + 1}
    with pytest.MonkeyPatch.context() as patch:
        forced_async(patch)
        engine = start(rig, FORMAT, room, cache=True, max_model_len=BLOCK * largest)
    with eyes(engine) as seen:
        truth = {sampling: alone(engine, requests, sampling) for sampling in (GREEDY, NOISY)}
    assert (seen.chunks, seen.cached, seen.resumed) == (0, 0, 0)
    yield Case(rig, engine, requests, truth)
    engine.close()


families = pytest.mark.parametrize("case", NAMES, indirect=True)


@families
def test_tokens_are_those_of_the_reference_engine(case):
    theirs = case.rig.engine(FORMAT).generate(case.requests, GREEDY)
    assert [r.ids for r in case.truth[GREEDY]] == [r.ids for r in theirs]
    assert sum(len(r.latents) for r in case.truth[GREEDY]) > 10


@families
def test_prompts_in_pieces_and_preemptions_a_step_ahead(case, monkeypatch):
    engine = case.engine
    assert type(scheduler(engine)).__name__ == "AsyncScheduler"
    monkeypatch.setattr(scheduler(engine), "max_num_scheduled_tokens", PIECE)
    for sampling in (GREEDY, NOISY):
        engine.llm.reset_prefix_cache()
        with eyes(engine) as seen:
            rollouts = engine.generate(case.requests, sampling)
        assert seen.chunks > 0
        assert seen.resumed > 0
        assert seen.restored > 0
        assert identical(rollouts, case.truth[sampling], rounding=True)
    without_restoring(monkeypatch)
    engine.llm.reset_prefix_cache()
    assert not identical(engine.generate(case.requests, NOISY), case.truth[NOISY], rounding=True)
    engine.llm.reset_prefix_cache()


def poisoned(case):
    """A prompt with latents in its first blocks, and the same tokens with others."""
    for request, rollout in zip(case.requests, case.truth[GREEDY], strict=True):
        whole = len(rollout.ids) // BLOCK * BLOCK
        if any(place < whole for place in rollout.latent_positions):
            given = replace(request, prompt_ids=rollout.ids, prompt_latents=(rollout.latents, rollout.latent_positions))
            return given, replace(given, prompt_latents=(-rollout.latents, rollout.latent_positions))
    raise AssertionError("no rollout fills a block with latents")


@families
def test_prefix_cache_shares_no_block_of_other_latents(case, monkeypatch):
    engine = case.engine
    first, other = poisoned(case)
    right = alone(engine, [first, other], GREEDY)
    assert not torch.equal(right[0].logprobs, right[1].logprobs)

    def again():
        engine.llm.reset_prefix_cache()
        assert identical(engine.generate([first], GREEDY), right[:1])
        with eyes(engine) as seen:
            warm = engine.generate([replace(other, seed=1)], GREEDY)
            same = engine.generate([first], GREEDY)
        assert seen.cached >= BLOCK
        return identical(warm, right[1:]) and identical(same, right[:1])

    assert again()
    monkeypatch.setattr(prefix, "latent_keys", lambda request, begin, end: [])
    assert not again()
    engine.llm.reset_prefix_cache()


@families
def test_aborts_in_the_middle_of_a_span(case):
    engine = case.engine
    filler = (i for i in count(60) if i not in engine.settings.limits.special_ids)
    thinkers = [[next(filler)] * 5 + [engine.markers.start] for _ in range(3)]
    engine.llm.reset_prefix_cache()
    with victims(engine, thinkers, steps=6, k=12):
        assert identical(engine.generate(case.requests, NOISY), case.truth[NOISY])
    assert identical(engine.generate(case.requests, GREEDY), case.truth[GREEDY])
    assert latent_state(engine).history.counts() == {"live": 0, "preempted": 0, "finished": 0}


@families
def test_other_weights_and_back_and_a_deep_sleep(case):
    engine = case.engine
    with changed(case.rig.model):
        engine.sync_weights(case.rig.model)
    assert not identical(engine.generate(case.requests, GREEDY), case.truth[GREEDY])
    engine.sleep(level=2)
    forget(latent_state(engine))
    engine.wake()
    engine.sync_weights(case.rig.model)
    assert identical(engine.generate(case.requests, NOISY), case.truth[NOISY])
    assert identical(engine.generate(case.requests, GREEDY), case.truth[GREEDY])
