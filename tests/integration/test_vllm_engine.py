"""The vLLM engine against teacher forcing and against the reference engine. Real vLLM, tiny models."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from engine_cases import FILTERED, GREEDY, SAMPLED, span_counts
from helpers import noise_image
from vllm_cases import VLLMRig, opened, thinking

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import check_parity

CASES = {
    "qwen2_5_vl": get_format("lvr", k=3),
    "qwen3_vl": get_format("lvr", k=5, length="free"),
    "internvl": get_format("monet", k=3, length="fixed"),
    "llava_onevision": get_format("monet", k=5),
    "qwen2": get_format("lvr", k=3, projector="mlp", norm="embedding"),
    "qwen3": get_format("lvr", k=4),
}
ROOM = {"qwen3": 12}
"""max_latents of the case, where it is not the default."""
LONG = replace(GREEDY, max_tokens=20)
SHORT = replace(SAMPLED, max_tokens=14)


class Case:
    """One model in both engines."""

    def __init__(self, folder, name):
        self.format = CASES[name]
        self.rig = VLLMRig(folder)
        attach_feedback(self.rig.model, self.format, folder)
        self.said = []
        with pytest.MonkeyPatch.context() as patch:
            from rl_lvr.rollout.vllm import state

            patch.setattr(state.logger, "info", lambda text, *values: self.said.append(text % values))
            self.vllm = self.rig.vllm(self.format, max_latents=ROOM.get(name, 128))
        self.hf = HFRolloutEngine(self.rig.model, self.rig.processor, self.format)
        self.markers = self.hf.markers

    def leftovers(self):
        return self.vllm.llm.collective_rpc("latent_status")[0]["tables"]

    def requests(self, **more):
        return opened(self.rig.requests(**more), self.markers.start)


@pytest.fixture(scope="module")
def cases(tiny_folder, tmp_path_factory):
    made = {}

    def case(name):
        if name not in made:
            format_ = CASES[name]
            feedback = format_ if format_.projector != "none" else None
            made[name] = Case(thinking(tiny_folder, tmp_path_factory.mktemp("vllm"), name, feedback), name)
        return made[name]

    yield case
    for each in made.values():
        each.vllm.close()


@pytest.fixture
def qwen(cases):
    return cases("qwen2_5_vl")


@pytest.fixture
def text(cases):
    return cases("qwen3")


def close(left, right, tolerance=1e-2):
    """Tokens, places and forced tokens alike, numbers nearly: rounding grows from latent to latent."""
    return (
        left.ids == right.ids
        and left.latent_positions == right.latent_positions
        and left.stop_reason == right.stop_reason
        and torch.equal(left.forced, right.forced)
        and torch.allclose(left.logprobs, right.logprobs, atol=tolerance)
        and torch.allclose(left.latents, right.latents, atol=tolerance)
    )


# ---- parity


@pytest.mark.parametrize("name", CASES)
def test_latents_and_logprobs_equal_teacher_forcing(cases, name):
    case = cases(name)
    requests = case.requests()
    filtered = [replace(FILTERED, max_tokens=14)] if name == "qwen2_5_vl" else []
    long = replace(LONG, max_tokens=12) if name in ROOM else LONG
    for sampling in (long, SHORT, *filtered):
        rollouts = case.vllm.generate(requests, sampling)
        report = check_parity(case.vllm, case.rig.model, requests, sampling, rollouts=rollouts)
        assert report.max_dh <= 1e-4, (sampling, report)
        assert report.max_dlogp <= 1e-4, (sampling, report)
        assert report.passes(control=0.1), (sampling, report)
        assert report.latents >= 6
        reference = case.hf.generate(requests, sampling)
        assert all(close(a, b) for a, b in zip(rollouts, reference, strict=True)), sampling
        if sampling is long:
            assert max(span_counts(rollouts, case.markers.start)) >= 2


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
    assert "0.0 MiB for 8 requests x 12 latents x 64 (max_num_seqs, max_latents, width)" in text.said[0]
    requests = text.requests()
    with pytest.raises(UserError, match=r"a span of 40 latents is longer than max_latents \(12\)"):
        text.vllm.generate([replace(requests[0], k=40)], SHORT)
    with pytest.raises(UserError, match=r"request \d: it generated more than max_latents \(12\).*raise max_latents"):
        text.vllm.generate([replace(r, k=9) for r in requests], replace(LONG, max_tokens=60))
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
        params = [SamplingParams(max_tokens=2, seed=i, extra_args={"latent_uid": uid}) for i, uid in enumerate(uids)]
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
    monkeypatch.setattr(weights, "load", lambda runner, named: load(runner, broken_off(named)))
    with pytest.raises(OSError, match="the sender died"):
        case.vllm.sync_weights(case.rig.model)
    monkeypatch.undo()
    case.vllm.sync_weights(case.rig.model)
    assert all(close(a, b) for a, b in zip(case.vllm.generate(requests, LONG), before, strict=True))


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


def test_every_hook_is_there_and_a_missing_one_is_named():
    from rl_lvr.rollout.vllm import guards

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
