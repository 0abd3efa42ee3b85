"""Whatever happens to a request inside vLLM, its tokens, log-probs and latents stay the same, bit by bit.

Real vLLM, one process, a tiny model with images. Every condition is seen to arise, and is switched off once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import Asked
from helpers import noise_image
from vllm_cases import VLLMRig, thinking
from vllm_conditions import (
    GREEDY,
    NOISY,
    ROOMY,
    TIGHT,
    alone,
    changed,
    counters,
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

from rl_lvr.evaluation.conditions import parse_conditions
from rl_lvr.evaluation.plan import Plan
from rl_lvr.latents.format import get_format
from rl_lvr.rollout import feeding
from rl_lvr.rollout.vllm import prefix
from rl_lvr.rollout.vllm.slots import SlotTables
from rl_lvr.rollout.vllm.state import LatentModelState

FORMAT = get_format("lvr", k=3)


@pytest.fixture(scope="module")
def rig(tiny_folder, tmp_path_factory):
    return VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("exact"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def engines(rig):
    """Engines by name, started when first asked for: cache or none, room or little of it."""
    made = {}

    def engine(name):
        if name not in made:
            room, cache = {"calm": (ROOMY, False), "cached": (ROOMY, True), "tight": (TIGHT, False)}[name]
            made[name] = start(rig, FORMAT, room, cache=cache)
        return made[name]

    yield engine
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def async_engine(rig):
    """Little room, the prefix cache, and the scheduler one step ahead of the worker."""
    with pytest.MonkeyPatch.context() as patch:
        forced_async(patch)
        engine = start(rig, FORMAT, TIGHT, cache=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def requests(engines, rig):
    return five_requests(rig, engines("calm").markers.start)


@pytest.fixture(scope="module")
def truth(engines, requests):
    """The undisturbed run: all at once, prompts whole, room for everybody, nothing cached, nothing ahead."""
    with eyes(engines("calm")) as seen:
        rollouts = {sampling: engines("calm").generate(requests, sampling) for sampling in (GREEDY, NOISY)}
    assert (seen.chunks, seen.cached, seen.resumed) == (0, 0, 0)
    assert sum(len(r.latents) for r in rollouts[NOISY]) > 20
    return rollouts


# ---- continuous batching


def test_batches_of_any_size_and_requests_that_join_and_leave(engines, requests, truth, monkeypatch):
    calm = engines("calm")
    assert identical(alone(calm, requests, NOISY), truth[NOISY])
    monkeypatch.setattr(scheduler(calm), "max_num_active_reqs", 2)
    assert identical(calm.generate(requests, NOISY), truth[NOISY])


def test_control_noise_from_a_global_generator(engines, requests, truth, monkeypatch):
    monkeypatch.setattr(feeding, "keyed_normal", lambda seeds, positions, size: torch.randn(len(seeds), size))
    monkeypatch.setattr(scheduler(engines("calm")), "max_num_active_reqs", 2)
    assert not identical(engines("calm").generate(requests, NOISY), truth[NOISY])


def test_control_rows_taken_for_slots(engines, requests, truth, monkeypatch):
    stock = LatentModelState.after_sampling

    def by_row(self, output, batch, prefill_len):
        stock(self, output, replace(batch, idx_mapping=torch.arange(len(batch.idx_mapping))), prefill_len)

    monkeypatch.setattr(LatentModelState, "after_sampling", by_row)
    monkeypatch.setattr(scheduler(engines("calm")), "max_num_active_reqs", 2)
    assert not identical(engines("calm").generate(requests, GREEDY), truth[GREEDY])


# ---- chunked prefill and preemption


@pytest.mark.parametrize("sampling", [GREEDY, NOISY], ids=["greedy", "noisy"])
def test_chunked_prefill_and_preemption_with_recomputation(engines, requests, truth, sampling):
    with eyes(engines("tight")) as seen:
        rollouts = engines("tight").generate(requests, sampling)
    assert seen.chunks > 0
    assert seen.resumed > 0
    assert seen.restored > 0
    assert identical(rollouts, truth[sampling])


def test_control_nothing_restored_after_preemption(engines, requests, truth, monkeypatch):
    without_restoring(monkeypatch)
    assert not identical(engines("tight").generate(requests, NOISY), truth[NOISY])


def test_control_chunks_that_take_part_in_spans(engines, requests, truth, monkeypatch):
    stock = LatentModelState.after_sampling
    monkeypatch.setattr(
        LatentModelState,
        "after_sampling",
        lambda self, output, batch, prefill_len: stock(self, output, batch, torch.zeros_like(prefill_len)),
    )
    assert not identical(engines("tight").generate(requests, NOISY), truth[NOISY])


# ---- async scheduling


def test_async_scheduling_with_preemption_and_cache(async_engine, requests, truth):
    assert type(scheduler(async_engine)).__name__ == "AsyncScheduler"
    assert async_engine.llm.llm_engine.engine_core.engine_core.batch_queue is not None
    with eyes(async_engine) as seen:
        rollouts = {sampling: async_engine.generate(requests, sampling) for sampling in (GREEDY, NOISY)}
    assert seen.chunks > 0
    assert seen.resumed > 0
    assert all(identical(rollouts[sampling], truth[sampling]) for sampling in rollouts)


def test_control_nothing_restored_under_async_scheduling(async_engine, requests, truth, monkeypatch):
    without_restoring(monkeypatch)
    async_engine.llm.reset_prefix_cache()
    assert not identical(async_engine.generate(requests, NOISY), truth[NOISY])


# ---- an engine in a process of its own


@pytest.fixture(scope="module")
def apart(rig):
    """As vLLM starts by itself: its scheduler and its worker live in a process of their own."""
    from vllm.envs import disable_envs_cache

    disable_envs_cache()  # an engine started earlier has fixed the environment for this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        engine = start(rig, FORMAT, TIGHT, cache=True)
    yield engine
    engine.close()


def test_an_engine_in_a_process_of_its_own(apart, rig, requests, truth):
    assert not hasattr(apart.llm.llm_engine.engine_core, "engine_core")
    before = counters(apart)
    rollouts = {sampling: apart.generate(requests, sampling) for sampling in (GREEDY, NOISY)}
    assert counters(apart)["resumed"] > before["resumed"]
    assert all(identical(rollouts[sampling], truth[sampling]) for sampling in rollouts)
    with changed(rig.model):
        apart.sync_weights(rig.model)
    assert not identical(apart.generate(requests, GREEDY), truth[GREEDY])
    apart.sync_weights(rig.model)
    assert identical(apart.generate(requests, GREEDY), truth[GREEDY])
    (worker,) = apart.llm.collective_rpc("latent_status")
    assert worker["tables"] == {"live": 0, "preempted": 0, "finished": 0}


# ---- prefix cache


@pytest.fixture(scope="module")
def longer(requests, truth):
    """Prompts that fill a block with the latents of an earlier call."""
    rows = zip(requests, truth[GREEDY], strict=True)
    return [
        replace(request, prompt_ids=r.ids, prompt_latents=(r.latents, r.latent_positions))
        for request, r in rows
        if len(r.ids) > 32 and len(r.latents)
    ]


@pytest.fixture(scope="module")
def poisoned(engines, longer):
    """The same tokens with other latents, and the right answers."""
    requests = [replace(r, prompt_latents=(-r.prompt_latents[0], r.prompt_latents[1])) for r in longer]
    return requests, engines("calm").generate(requests, GREEDY)


def test_prefix_cache_on_and_warm(engines, requests, truth, longer):
    cached = engines("cached")
    assert identical(cached.generate(requests, NOISY), truth[NOISY])
    cold = cached.generate(longer, GREEDY)
    with eyes(cached) as seen:
        assert identical(cached.generate(longer, GREEDY), cold)
    assert seen.cached >= 32


def test_prefix_cache_shares_no_block_of_other_latents(engines, longer, poisoned):
    cached, (requests, right) = engines("cached"), poisoned
    cached.generate(longer, GREEDY)
    assert identical(cached.generate(requests, GREEDY), right)


def test_control_prefix_cache_without_latent_keys(engines, longer, poisoned, monkeypatch):
    cached, (requests, right) = engines("cached"), poisoned
    monkeypatch.setattr(prefix, "latent_keys", lambda request, begin, end: [])
    cached.llm.reset_prefix_cache()
    cached.generate(longer, GREEDY)
    wrong = cached.generate(requests, GREEDY)
    cached.llm.reset_prefix_cache()
    assert not identical(wrong, right)


# ---- the conditions of an evaluation


@pytest.fixture(scope="module")
def plan(rig):
    """Two questions about images, with prompts of a block of 32 and a bit more, under three conditions."""
    rows = [([noise_image(i, 112, 112)], "from red 3 hops what is next from blue 2 hops 1") for i in range(2)]
    return Plan(Asked(rig.requests(rows), ("x", "y")), parse_conditions("own,noise,zeros"), NOISY)


def lengths(plan):
    found = [len(request.prompt_ids) for request in plan.questions.requests(range(len(plan.questions)))]
    assert all(32 < length < 64 - plan.sampling.max_tokens for length in found)
    return found


def test_a_plan_prefills_a_prompt_once_and_behind_it_the_last_block_alone(engines, plan):
    cached = engines("cached")
    cached.llm.reset_prefix_cache()
    with eyes(cached) as seen:
        together = [one for call in plan.run(cached) for one in call]
    assert seen.prefilled == sum(length + 2 * (length - 32) for length in lengths(plan))
    calm = [one for call in plan.run(engines("calm")) for one in call]
    assert identical([one.rollout for one in together], [one.rollout for one in calm])
    assert sum(len(one.latents) for one in together) > 6


def test_control_a_call_per_condition_prefills_prompts_each_time(engines, plan):
    cached, found = engines("cached"), 0
    for condition in plan.conditions:
        cached.llm.reset_prefix_cache()
        with eyes(cached) as seen:
            list(plan.run(cached, done=lambda item, one=condition: item.condition != one))
        found += seen.prefilled
    assert found == 3 * sum(lengths(plan))


# ---- aborts


@pytest.fixture
def thinkers(engines):
    """Prompts that go straight into a span."""
    filler, marker = 60, engines("calm").markers.start
    return [[filler + i] * (4 + i) + [marker] for i in range(3)]


def test_aborts_in_the_middle_of_a_span(engines, requests, truth, thinkers):
    calm = engines("calm")
    with victims(calm, thinkers, steps=6, k=12):
        assert identical(calm.generate(requests, NOISY), truth[NOISY])
    assert identical(calm.generate(requests, GREEDY), truth[GREEDY])
    assert latent_state(calm).history.counts() == {"live": 0, "preempted": 0, "finished": 0}


def test_control_a_slot_that_remembers_who_was_aborted(engines, requests, truth, thinkers, monkeypatch):
    stock = SlotTables.add

    def forgetful(self, slot, args, sampling, *, broken):
        feed = self.feed[slot].clone()
        stock(self, slot, args, sampling, broken=broken)
        self.feed[slot] = feed

    calm = engines("calm")
    monkeypatch.setattr(SlotTables, "add", forgetful)
    with victims(calm, thinkers, steps=6, k=12):
        calm.generate(requests[:1], GREEDY)
    assert not identical(calm.generate(requests, GREEDY), truth[GREEDY])


# ---- weights and sleep


def test_weights_that_change_between_batches(engines, rig, requests, truth, longer):
    cached = engines("cached")
    before = cached.generate(longer, GREEDY)
    with changed(rig.model):
        cached.sync_weights(rig.model)
    other = cached.generate(longer, GREEDY)
    cached.sync_weights(rig.model)
    assert not identical(other, before)
    assert identical(cached.generate(longer, GREEDY), before)
    assert identical(cached.generate(requests, NOISY), truth[NOISY])


def test_control_a_prefix_cache_that_outlives_its_weights(engines, rig, longer, monkeypatch):
    cached = engines("cached")
    cached.generate(longer, GREEDY)
    with changed(rig.model), monkeypatch.context() as patch:
        patch.setattr(cached.llm, "reset_prefix_cache", lambda: True)
        cached.sync_weights(rig.model)
    stale = cached.generate(longer, GREEDY)
    cached.llm.reset_prefix_cache()
    right = cached.generate(longer, GREEDY)
    cached.sync_weights(rig.model)
    assert not identical(stale, right)


def test_sleep_and_wake(engines, requests, truth):
    cached = engines("cached")
    cached.sleep()
    cached.wake()
    assert identical(cached.generate(requests, NOISY), truth[NOISY])


def test_nothing_on_the_device_has_to_outlive_a_deep_sleep(engines, rig, requests, truth):
    cached = engines("cached")
    cached.sleep(level=2)
    forget(latent_state(cached))
    cached.wake()
    cached.sync_weights(rig.model)
    assert identical(cached.generate(requests, NOISY), truth[NOISY])


def test_control_a_ban_that_a_deep_sleep_took_away(engines, requests, truth, monkeypatch):
    cached = engines("cached")
    state = latent_state(cached)
    monkeypatch.setattr(state, "_never", torch.full_like(state._never, cached.markers.start))
    assert not identical(cached.generate(requests, GREEDY), truth[GREEDY])
