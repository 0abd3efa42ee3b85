"""The vLLM engine on text-only models: parity, what it refuses, what it leaves behind, weights. Real vLLM."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from engine_cases import GREEDY
from vllm_cases import LENGTH, TEXT, VLLMRig
from vllm_conditions import latent_state
from vllm_pairs import LONG, ROOM, SHORT, assert_parity, assert_starts, close, started

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.types import Capability
from rl_lvr.rollout.vllm import cpu, guards, memory, wire


@pytest.fixture(scope="module")
def cases(tiny_folder, tmp_path_factory):
    with started(tiny_folder, tmp_path_factory) as case:
        yield case


@pytest.fixture
def text(cases):
    return cases("qwen3")


# ---- parity


@pytest.mark.parametrize("name", TEXT)
def test_latents_and_logprobs_equal_teacher_forcing(cases, name):
    assert_parity(cases(name), replace(LONG, max_tokens=12) if name in ROOM else LONG, SHORT)


def test_start_is_forced_forbidden_and_biased_as_in_the_reference_engine(cases):
    assert_starts(cases("qwen2"), replace(GREEDY, max_tokens=10), replace(SHORT, max_tokens=10))


# ---- refusals and interruptions


def test_an_interrupted_call_leaves_nothing(text, monkeypatch):
    requests = text.requests()
    before = text.vllm.generate(requests, replace(GREEDY, max_tokens=6))
    step, calls = text.vllm.llm.llm_engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(text.vllm.llm.llm_engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text.vllm.generate(requests, SHORT)
    assert text.leftovers() == {"live": 0, "preempted": 0, "finished": 0}
    assert not text.vllm.llm.llm_engine.has_unfinished_requests()
    after = text.vllm.generate(requests, replace(GREEDY, max_tokens=6))
    assert all(close(a, b) for a, b in zip(after, before, strict=True))


def test_more_latents_than_there_is_room_for(text):
    told = r"([\d.]+) MiB for 8 requests x 2 x 12 latents x 64 \(max_num_seqs, max_latents, width\)"
    size = latent_state(text.vllm).tables.nbytes
    assert float(re.search(told, text.said[0])[1]) == round(size / 2**20, 1) > 0
    requests = text.requests()[1::2]
    with pytest.raises(UserError, match=r"a span of 40 latents is longer than max_latents \(12\)"):
        text.vllm.generate([replace(requests[0], k=40)], SHORT)
    with pytest.raises(UserError, match=r"request \d: it generated more than max_latents \(12\).*raise max_latents"):
        text.vllm.generate([replace(r, k=9) for r in requests], replace(LONG, max_tokens=40))
    assert text.leftovers() == {"live": 0, "preempted": 0, "finished": 0}
    assert text.vllm.generate(requests, replace(SHORT, max_tokens=8))


def test_an_impossible_raw_request_is_ended_with_its_reason(text):
    from vllm import SamplingParams

    wrong = ({"latent_k": "three"}, {"latent_kk": 3}, {"latent_vectors": "AAAA", "latent_intervention": "given"})
    for i, extra in enumerate(wrong):
        params = SamplingParams(max_tokens=9, extra_args={"latent_uid": str(i), **extra})
        output = text.vllm.llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 1
        ((*_, error),) = text.vllm.llm.collective_rpc("latent_pop", args=([str(i)],))[0][str(i)]
        assert "latent" in error or "vectors" in error


def test_many_short_requests_with_random_aborts_leave_nothing(text):
    import random

    from vllm import SamplingParams

    pick, llm = random.Random(0), text.vllm.llm
    left = 500
    names = []
    while left or llm.llm_engine.has_unfinished_requests():
        new = min(left, 12)
        left -= new
        uids = [f"short-{left}-{i}" for i in range(new)]
        params = [
            SamplingParams(max_tokens=1 + i % 2, seed=i, extra_args={"latent_uid": uid}) for i, uid in enumerate(uids)
        ]
        prompt = {"prompt_token_ids": [1, 2, text.markers.start]}
        ids = llm.enqueue([prompt] * new, params, use_tqdm=False) if new else []
        names += uids
        for _ in range(3):
            llm.llm_engine.step()
            llm.llm_engine.abort_request([i for i in ids if pick.random() < 0.2], internal=True)
    found = llm.collective_rpc("latent_pop", args=(names,))[0]
    assert len(found) == 500
    assert sum(map(len, found.values())) > 250
    assert text.leftovers() == {"live": 0, "preempted": 0, "finished": 0}


BROKEN = {
    "k": {"latent_k": 2**63, "latent_intervention": "skip"},
    "filler": {"latent_filler": 2**63},
    "sigma": {"latent_sigma": 1e39},
    "opens": {"latent_opens": "yes"},
    "prompt latents": {"latent_prompt_vectors": 3, "latent_prompt_positions": 4},
}


def test_a_request_with_impossible_numbers_breaks_alone(text, monkeypatch):
    """Also where no check has seen them coming: whatever a request holds, vLLM's worker must live."""
    from vllm import SamplingParams

    good = text.requests()[:2]
    before = text.vllm.generate(good, replace(GREEDY, max_tokens=4))
    prompt = {"prompt_token_ids": [1, 2, text.markers.start]}

    def run(extra, **more):
        params = SamplingParams(max_tokens=3, extra_args={"latent_uid": "u", **extra}, **more)
        (output,) = text.vllm.llm.generate([prompt], params, use_tqdm=False)
        ((*_, error),) = text.vllm.llm.collective_rpc("latent_pop", args=(["u"],))[0]["u"]
        assert error is None or len(output.outputs[0].token_ids) == 1
        return error

    for name, extra in BROKEN.items():
        assert f"latent_{name.split()[0]}" in run(extra), name
    assert run({}, top_k=2**63) is None, "all tokens"
    with monkeypatch.context() as patch:
        patch.setattr(wire, "MOST", 2**80)
        assert f"the number {2**63}, which is too large" in run({"latent_filler": 2**63})
    assert text.leftovers() == {"live": 0, "preempted": 0, "finished": 0}
    after = text.vllm.generate(good, replace(GREEDY, max_tokens=4))
    assert all(close(a, b) for a, b in zip(after, before, strict=True))


# ---- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pipeline_parallel_size": 2}, "do not work with pipeline parallelism: use tensor_parallel_size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "do not work with speculative decoding: leave speculative_config out",
        ),
        ({"max_num_batched_tokens": 4}, "vLLM refuses these settings: .*max_num_batched_tokens"),
    ],
    ids=["pipeline", "speculative", "vllm's own"],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(text, settings, words, monkeypatch):
    import vllm

    def start(*args, **more):
        raise AssertionError("vLLM was started")

    monkeypatch.setattr(vllm, "LLM", start)
    with pytest.raises(UserError, match="could not start: AssertionError: vLLM was started"):
        text.rig.vllm(text.format)
    with pytest.raises(UserError, match=words) as told:
        text.rig.vllm(text.format, engine_args=settings)
    assert "\n" not in str(told.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_the_cache_has_a_size_that_fits_unless_the_user_gives_one(text, monkeypatch):
    import vllm

    class Started(BaseException):
        pass

    def size(free, **more):
        def start(**arguments):
            raise Started(arguments)

        monkeypatch.setattr(memory, "free_per_worker", lambda workers: free)
        monkeypatch.setattr(vllm, "LLM", start)
        with pytest.raises(Started) as told:
            text.rig.vllm(text.format, engine_args={"num_gpu_blocks_override": None, "block_size": 32}, **more)
        return told.value.args[0].get("kv_cache_memory_bytes")

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    block = 2 * 2 * 32 * 32 * 4  # keys and values, layers, tokens, width of the one head, bytes
    one = block * (LENGTH // 32 + 1)
    assert size(1 << 40) == block * (8 * LENGTH // 32 + 1), "all that 8 requests can use"
    weights = int(memory.OVERHEAD * 4 * sum(p.numel() for p in text.rig.model.parameters()))
    assert one <= size(weights + one) <= size(weights + 3 * one) <= 2 * one
    assert size(0, gpu_memory_utilization=0.5) is None
    with pytest.raises(UserError, match="of cache for one request of 256 tokens, and 0 MiB are free"):
        size(0)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert size(0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_a_machine_that_runs_no_kernels_is_told_so(text, monkeypatch):
    monkeypatch.setattr(guards, "interpreted", lambda: False)  # Triton decides that once, on import
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1 in the environment before the start"):
        text.rig.vllm(text.format)


def test_a_quantized_model_takes_no_weights(text, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    for method, takes in ((None, True), ("fp8", False)):
        arguments = EngineArgs(str(text.rig.folder), dtype="bfloat16", quantization=method, max_model_len=64)
        found = guards.engine_config(arguments, UsageContext.LLM_CLASS).model_config.quantization
        with nullcontext() if takes else pytest.raises(UserError, match="a model in fp8 cannot take"):
            guards.refuse_quantized(found, "serve another")
    with monkeypatch.context() as patch:
        patch.setattr(text.vllm.llm.llm_engine.vllm_config.model_config, "quantization", "fp8")
        with pytest.raises(UserError, match="a model in fp8 cannot take a trainer's weights: leave quantization out"):
            text.vllm.sync_weights(text.rig.model)
    assert Capability.WEIGHTS in text.vllm.capabilities
    text.vllm.sync_weights(text.rig.model)


# ---- weights


def test_sync_weights(cases, monkeypatch):
    from rl_lvr.rollout.vllm import weights

    case = cases("qwen2")
    requests = case.requests()[:3]
    before = case.vllm.generate(requests, LONG)
    trainer = VLLMRig(case.rig.folder)
    attach_feedback(trainer.model, case.format, trainer.folder)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    case.vllm.sync_weights(trainer.model)
    theirs = HFRolloutEngine(trainer.model, trainer.processor, case.format).generate(requests, LONG)
    after = case.vllm.generate(requests, LONG)
    assert all(close(a, b) for a, b in zip(after, theirs, strict=True))
    assert not any(close(a, b) for a, b in zip(after, before, strict=True))

    def broken_off(named):
        yield from itertools.islice(named, 20)
        raise OSError("the sender died")

    load = weights.load
    monkeypatch.setattr(weights, "load", lambda runner, named: load(runner, itertools.islice(named, 1, None)))
    with pytest.raises(RuntimeError, match="did not take over the weights"):
        case.vllm.sync_weights(trainer.model)
    with pytest.raises(UserError, match=r"the last sync_weights failed.*: call sync_weights again"):
        case.vllm.generate(requests, LONG)
    monkeypatch.setattr(weights, "load", lambda runner, named: load(runner, broken_off(named)))
    with pytest.raises(OSError, match="the sender died"):
        case.vllm.sync_weights(case.rig.model)
    with pytest.raises(UserError, match="the last sync_weights failed"):
        case.vllm.generate(requests, LONG)
    monkeypatch.undo()
    case.vllm.sync_weights(case.rig.model)
    assert all(close(a, b) for a, b in zip(case.vllm.generate(requests, LONG), before, strict=True))


def test_a_failed_sync_leaves_no_prefix_of_other_weights(cases, monkeypatch):
    from rl_lvr.rollout.vllm import weights

    case = cases("qwen2")
    emptied = []
    reset = case.vllm.llm.reset_prefix_cache
    monkeypatch.setattr(case.vllm.llm, "reset_prefix_cache", lambda: emptied.append(reset()) or emptied[-1])

    def dies(runner, named):
        raise OSError("the sender died")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "load", dies)
        with pytest.raises(OSError, match="the sender died"):
            case.vllm.sync_weights(case.rig.model)
    assert emptied == [True]
    case.vllm.sync_weights(case.rig.model)
    assert emptied == [True, True]


def test_nothing_is_generated_after_a_deep_sleep_without_new_weights(text):
    requests, sampling = text.requests()[:1], replace(GREEDY, max_tokens=2)
    text.vllm.sleep(level=2)
    text.vllm.wake()
    with pytest.raises(UserError, match="slept at level 2, which drops its weights: call sync_weights after wake"):
        text.vllm.generate(requests, sampling)
    text.vllm.sync_weights(text.rig.model)
    assert text.vllm.generate(requests, sampling)
    text.vllm.sleep(level=1)
    text.vllm.wake()
    assert text.vllm.generate(requests, sampling)


# ---- a head that is tied to the embedding: on a CPU vLLM computes it with a copy


def stepped(case, rate):
    """Another instance of the model, one step of training further."""
    model = VLLMRig(case.rig.folder).model
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight += rate * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    return model


def agree(case, model):
    """Whether the engine's tokens and log-probs are those of `model`."""
    requests, sampling = case.requests()[:3], replace(LONG, max_tokens=12)
    rollouts = case.vllm.generate(requests, sampling)
    report = check_parity(case.vllm, model, requests, sampling, rollouts=rollouts)
    theirs = HFRolloutEngine(model, case.rig.processor, case.format).generate(requests, sampling)
    return report.max_dlogp <= 1e-4 and all(close(a, b) for a, b in zip(rollouts, theirs, strict=True))


def test_a_tied_head_is_the_trainers_after_a_sync(text):
    model = stepped(text, 0.05)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not agree(text, model), "the control: not synced yet"
    text.vllm.sync_weights(model)
    assert agree(text, model)
    text.vllm.llm.collective_rpc("reload_weights")  # vLLM's own, from the folder
    text.vllm.llm.reset_prefix_cache()
    assert agree(text, text.rig.model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is packed on a GPU")
def test_a_head_that_keeps_its_old_weights_is_refused(text, monkeypatch):
    """Also after a step as small as those of a real run."""
    requests = text.requests()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "repack", lambda model, before: None)
        for rate in (0.05, 1e-6):
            with pytest.raises(RuntimeError, match=r"worker 0 did not .* its output head computes other logits"):
                text.vllm.sync_weights(stepped(text, rate))
            with pytest.raises(UserError, match="the last sync_weights failed"):
                text.vllm.generate(requests, SHORT)
    text.vllm.sync_weights(text.rig.model)
    assert agree(text, text.rig.model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is packed on a GPU")
def test_a_layer_that_got_no_weights_is_named(text):
    runner = text.vllm.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    named = [(name, value) for name, value in text.rig.model.state_dict().items() if "1.mlp.down_proj" not in name]
    with pytest.raises(RuntimeError, match=r"no weights came for model\.layers\.1\.mlp\.down_proj"):
        runner.reload_weights(weights_iterator=named)
    text.vllm.sync_weights(text.rig.model)


# ---- the hooks


def test_every_hook_is_there_and_a_missing_one_is_named():
    for hooks in (guards.HOOKS, guards.SERVER_HOOKS):
        guards.check_hooks(hooks)
        for place, name, parameters in hooks:
            module = place if isinstance(place, str) else place[0]
            assert guards.missing_hooks([(place, f"{name}_gone", parameters)]) == [f"{module}.{name}_gone"]
    gone = (
        ("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.prepare_embeddings", ()),
        ("vllm.v1.worker.gpu.sample.sampler", "Sampler.__call__", ("hidden",)),
        ("vllm.v2.engine", "LLMEngine", ()),
    )
    with pytest.raises(UserError) as refusal:
        guards.check_hooks(gone)
    for name in ("DefaultModelState.prepare_embeddings", "Sampler.__call__(hidden)", "vllm.v2.engine.LLMEngine"):
        assert name in str(refusal.value)
