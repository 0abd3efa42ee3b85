"""Exactness with everything at once: the engine in a process of its own, two tensor-parallel workers, a scheduler one
step ahead, the prefix cache, chunked prefill and preemptions.

Sums over two ranks round differently from those of one, so here the undisturbed run is each request alone in the same
engine; against one process the tokens are the same and the rest agrees to 1e-4.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from vllm_cases import VLLMRig, thinking
from vllm_conditions import (
    GREEDY,
    NOISY,
    TIGHT,
    alone,
    changed,
    counters,
    five_requests,
    forced_async,
    identical,
    start,
)

from rl_lvr.errors import UserError
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.replay import check_parity

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def rig(tiny_folder, tmp_path_factory):
    return VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("processes"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def engine(rig):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the controls, which run code in the workers
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        forced_async(patch)
        made = start(rig, get_format("lvr", k=3), TIGHT, cache=True, tensor_parallel_size=2)
        yield made
        made.close()


@pytest.fixture(scope="module")
def requests(engine, rig):
    return five_requests(rig, engine.markers.start)


@pytest.fixture(scope="module")
def truth(engine, requests):
    before = counters(engine)
    rollouts = alone(engine, requests, NOISY)
    assert counters(engine)["resumed"] == before["resumed"]
    assert sum(len(r.latents) for r in rollouts) > 20
    return rollouts


def test_two_ranks_in_other_processes(engine, rig, requests, truth):
    before = counters(engine)
    rollouts = engine.generate(requests, NOISY)
    after = counters(engine)
    assert after["resumed"] > before["resumed"]
    assert identical(rollouts, truth)
    assert check_parity(engine, rig.model, requests, NOISY, rollouts=rollouts).passes(control=0.1)
    greedy = engine.generate(requests, GREEDY)
    alone_in_one = rig.engine(engine.format).generate(requests, GREEDY)
    assert [r.ids for r in greedy] == [r.ids for r in alone_in_one]


def test_other_weights_and_back_in_both_ranks(engine, rig, requests, truth):
    with changed(rig.model):
        engine.sync_weights(rig.model)
    try:
        assert not identical(engine.generate(requests, NOISY), truth)
    finally:
        engine.sync_weights(rig.model)
    assert identical(engine.generate(requests, NOISY), truth)


def histories(worker):
    """A worker's latents of all slots, those that ended included."""
    return worker.model_runner.model_state.tables.history.numpy().tobytes()


def test_ranks_have_the_same_latents_bit_by_bit(engine, requests, truth):
    assert engine.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size == 2
    engine.generate(requests, NOISY)
    ranks = engine.llm.collective_rpc(histories)
    assert len(ranks) == 2
    assert all(left == right for left, right in pairwise(ranks))


def noise_from_a_generator(worker):
    from rl_lvr.rollout import feeding

    generator = torch.Generator().manual_seed(worker.rank)
    feeding.keyed_normal, feeding.kept = (
        lambda seeds, positions, size: torch.randn(len(seeds), size, generator=generator),
        feeding.keyed_normal,
    )


def keyed_noise_again(worker):
    from rl_lvr.rollout import feeding

    feeding.keyed_normal = feeding.kept
    del feeding.kept


def test_control_noise_from_a_generator_of_each_rank(engine, requests, truth):
    engine.llm.collective_rpc(noise_from_a_generator)
    try:
        rollouts = engine.generate(requests, NOISY)
        left, right = engine.llm.collective_rpc(histories)
    finally:
        engine.llm.collective_rpc(keyed_noise_again)
    assert left != right
    assert not identical(rollouts, truth)


def nothing_restored(worker):
    state = worker.model_runner.model_state
    state._write_planted = lambda embeds, batch: None


def restored_again(worker):
    del worker.model_runner.model_state._write_planted


def test_control_nothing_restored_in_the_workers(engine, requests, truth):
    engine.llm.reset_prefix_cache()
    engine.llm.collective_rpc(nothing_restored)
    try:
        rollouts = engine.generate(requests, NOISY)
    finally:
        engine.llm.collective_rpc(restored_again)
    assert not identical(rollouts, truth)


def test_a_plugin_that_did_not_load_in_the_worker_is_noticed(tiny_folder, tmp_path, monkeypatch):
    """vLLM would serve the stock model without a word. With the plugin the same start succeeds in all other tests."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_PLUGINS", "somebody_elses")
    rig = VLLMRig(thinking(tiny_folder, tmp_path, "qwen2"))
    with pytest.raises(UserError, match="not at work in vLLM's worker 0, which runs Qwen2ForCausalLM"):
        rig.vllm(get_format("lvr"))
