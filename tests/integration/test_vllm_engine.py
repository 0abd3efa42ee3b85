"""The vLLM engine against teacher forcing and the reference engine: four vision families. Real vLLM, tiny models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import FILTERED, GREEDY, SAMPLED
from helpers import FAMILIES, noise_image
from vllm_cases import VLLMRig
from vllm_pairs import LONG, SHORT, assert_parity, assert_starts, close, started

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import check_parity


@pytest.fixture(scope="module")
def cases(tiny_folder, tmp_path_factory):
    with started(tiny_folder, tmp_path_factory) as case:
        yield case


@pytest.fixture
def qwen(cases):
    return cases("qwen2_5_vl")


# ---- parity


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_and_logprobs_equal_teacher_forcing(cases, name):
    filtered = [replace(FILTERED, max_tokens=14)] if name == "qwen2_5_vl" else []
    assert_parity(cases(name), LONG, SHORT, *filtered)


def test_the_decision_to_end_a_span_is_drawn_as_in_the_reference_engine(cases):
    case = cases("qwen3_vl")
    request = case.rig.requests()[1]
    requests = [replace(request, prompt_ids=[*request.prompt_ids, case.markers.start], seed=i) for i in range(8)]
    sampling = replace(SAMPLED, max_tokens=6, temperature=1.3)
    ours, theirs = (engine.generate(requests, sampling) for engine in (case.vllm, case.hf))
    lengths = []
    for a, b in zip(ours, theirs, strict=True):
        length = a.completion_ids.index(case.markers.end) + 1
        lengths.append(length)
        assert a.completion_ids[:length] == b.completion_ids[:length]
        assert torch.allclose(a.logprobs[:length], b.logprobs[:length], atol=1e-4)
        assert torch.equal(a.forced[:length], b.forced[:length])
    assert len(set(lengths)) > 1


# ---- control of START


@pytest.mark.parametrize("name", ["internvl", "llava_onevision"])
def test_start_is_forced_forbidden_and_biased_as_in_the_reference_engine(cases, name):
    assert_starts(cases(name), replace(SAMPLED, max_tokens=10))


# ---- what is fed


VECTORS = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_every_intervention_equals_the_reference_engine(cases, name):
    """Rows of one batch with different interventions, one each."""
    case = cases(name)
    base = case.rig.requests()
    filler = case.rig.tokenizer.encode("red", add_special_tokens=False)[0]
    requests = []
    for i, kind in enumerate(Intervention):
        ids = list(base[i % 6].prompt_ids)
        if kind not in (Intervention.NONE, Intervention.PLAIN_TOKENS):
            ids.append(case.markers.start)
        more = {"vectors": VECTORS} if kind.needs_vectors else {}
        requests.append(replace(base[i % 6], prompt_ids=ids, intervention=kind, seed=i, filler_id=filler, **more))
    ours, theirs = (engine.generate(requests, replace(GREEDY, max_tokens=12)) for engine in (case.vllm, case.hf))
    for request, a, b in zip(requests, ours, theirs, strict=True):
        assert close(a, b), request.intervention
    fed = [r.latents for r in ours if r.intervention.feeds_vectors]
    assert all(len(latents) for latents in fed)
    assert not [r for r in ours if len(r.latents) and not r.intervention.feeds_vectors]


def test_noise_is_that_of_the_reference_engine(qwen):
    sampling = replace(LONG, max_tokens=10, sigma=0.5)
    requests = qwen.requests()
    ours, theirs = (engine.generate(requests, sampling) for engine in (qwen.vllm, qwen.hf))
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    plain = qwen.vllm.generate(requests, replace(sampling, sigma=0.0))
    assert not all(close(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_latents_in_the_prompt(cases, name):
    """Taken up again in the middle, a rollout goes on as it did; with other vectors it does not."""
    case = cases(name)
    request = replace(case.requests()[1], seed=5)
    whole = case.vllm.generate([request], LONG)[0]
    cuts = []
    for length in (len(request.prompt_ids) + n for n in (1, 2, 4, 7)):
        places = [p for p in whole.latent_positions if p < length]
        kept = torch.tensor([p < length for p in whole.latent_positions])
        cuts.append(replace(request, prompt_ids=whole.ids[:length], prompt_latents=(whole.latents[kept], places)))
    for cut, rollout in zip(cuts, case.vllm.generate(cuts, LONG), strict=True):
        rest = len(whole.ids) - len(cut.prompt_ids)
        assert rollout.completion_ids[:rest] == whole.ids[len(cut.prompt_ids) :]
        shared = len(whole.latent_positions)
        assert rollout.latent_positions[:shared] == whole.latent_positions
        assert torch.allclose(rollout.latents[:shared], whole.latents, atol=1e-3)
    vectors, places = cuts[-1].prompt_latents
    other = replace(cuts[-1], prompt_latents=(vectors.flip(0) + 1, places))
    one, two = case.vllm.generate([cuts[-1], other], LONG)
    assert torch.equal(two.latents[: len(places)], vectors.flip(0) + 1)
    assert not close(one, replace(two, latents=one.latents))


def test_slots_and_placeholders_are_never_sampled(qwen):
    requests = qwen.requests()
    rollouts = qwen.vllm.generate(requests, replace(SAMPLED, temperature=2.0, max_tokens=14))
    for rollout in rollouts:
        chosen = {t for t, f in zip(rollout.completion_ids, rollout.forced.tolist(), strict=True) if not f}
        assert not chosen & set(qwen.markers.never_sampled)


# ---- raw use of vLLM, as TRL uses it


def test_several_completions_of_one_request_have_a_history_each(qwen):
    from vllm import SamplingParams

    from rl_lvr.rollout.vllm import calls

    request = qwen.rig.requests()[1]
    params = SamplingParams(
        n=3,
        seed=11,
        max_tokens=12,
        temperature=1.0,
        logprobs=0,
        extra_args={"latent_uid": "group", "latent_sigma": 0.3},
    )
    prompt = {"prompt_token_ids": [*request.prompt_ids, qwen.markers.start]}
    output = qwen.vllm.llm.generate([prompt], params, use_tqdm=False)[0]
    rows = qwen.vllm.llm.collective_rpc("latent_pop", args=(["group"],))[0]["group"]
    assert len(rows) == 3
    sampling = replace(SAMPLED, max_tokens=12, sigma=0.3)
    requests = [replace(request, prompt_ids=prompt["prompt_token_ids"], seed=11 + i) for i in range(3)]
    rollouts = [
        calls.rollout_of(i, requests[i], 11 + i, sampling, qwen.vllm.settings, qwen.vllm.answer(i, output, rows[i], i))
        for i in range(3)
    ]
    assert check_parity(qwen.vllm, qwen.rig.model, requests, sampling, rollouts=rollouts).passes(control=0.1)
    assert not torch.allclose(rollouts[0].latents[:3], rollouts[1].latents[:3], atol=1e-2)
    assert qwen.vllm.llm.collective_rpc("latent_pop", args=(["group"],))[0]["group"] == []  # given out once


# ---- refusals


def test_pictures_and_prompt_must_belong_together(qwen):
    request = qwen.rig.requests()[0]
    with pytest.raises(UserError, match="request 0 has images but no pictures"):
        qwen.vllm.generate([replace(request, pictures=())], SHORT)
    with pytest.raises(UserError, match="image processor makes"):
        qwen.vllm.generate([replace(request, pictures=(noise_image(9, 112, 112),))], SHORT)
    assert qwen.vllm.generate([request], replace(SHORT, max_tokens=2))


# ---- weights


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_sync_weights_of_an_adapted_vision_model(cases, name):
    from peft import LoraConfig, get_peft_model

    case = cases(name)
    requests = case.requests()[:2]
    trainer = VLLMRig(case.rig.folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer.model = get_peft_model(trainer.model, config).eval()
    before = case.vllm.generate(requests, LONG)
    case.vllm.sync_weights(trainer.model)
    theirs = HFRolloutEngine(trainer.model, trainer.processor, case.format).generate(requests, LONG)
    after = case.vllm.generate(requests, LONG)
    assert all(close(a, b) for a, b in zip(after, theirs, strict=True))
    assert not any(close(a, b) for a, b in zip(after, before, strict=True))
    case.vllm.sync_weights(case.rig.model)


# ---- the mechanisms, switched off


def test_the_self_test_notices_latents_that_are_not_fed(qwen, monkeypatch):
    from rl_lvr.rollout.vllm import selftest, state

    selftest.run(qwen.vllm.llm, qwen.vllm.settings)
    monkeypatch.setattr(state.LatentModelState, "_overlay", lambda self, embeds, batch: None)
    with pytest.raises(UserError, match="latents do not reach the model in vLLM's worker 0"):
        selftest.run(qwen.vllm.llm, qwen.vllm.settings)
