"""Control of START in the reference engine: forced, forbidden and biased completions, alone and in one batch.

Independent of the engine's own code: a prompt that ends in START, the intervention `none`, and the same bias on the
model's output head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import FORMATS, GREEDY, SAMPLED, Rig, same, span_counts

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import forward_hidden
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.rollout.replay import check_parity, replay_batch
from rl_lvr.rollout.types import Request, Rollout, Sampling, StopReason

FORCED, FORBIDDEN = LatentStart.parse("forced"), LatentStart.parse("forbidden")
MORE, LESS, ZERO = (LatentStart.parse(text) for text in ("bias 6", "bias -6", "bias 0"))
VARIANTS = {
    "fixed": get_format("lvr", k=3),
    "free": get_format("lvr", k=4, length="free"),
    "before_start": get_format("monet", k=3, length="fixed"),
    "free_before_start": get_format("monet", k=4),
}
PENALISED = Sampling(max_tokens=16, temperature=0.8, top_k=40, repetition_penalty=1.3, seed=5)


@pytest.fixture(scope="module")
def rig(load_tiny: Any) -> Rig:
    return Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))


@pytest.fixture(params=VARIANTS)
def form(request: pytest.FixtureRequest) -> Any:
    return VARIANTS[request.param]


def seeded(rig: Rig, **more: Any) -> list[Request]:
    return [replace(request, seed=70 + i, **more) for i, request in enumerate(rig.requests())]


def short(sampling: Sampling, start: LatentStart = FREE) -> Sampling:
    return replace(sampling, max_tokens=16, latent_start=start)


# ---- forced


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_forced_start_is_one_at_the_end_of_the_prompt(rig: Rig, form: Any, sampling: Sampling) -> None:
    """The same tokens and latents as after a prompt with that START, but for where prompt and completion part."""
    engine, requests = rig.engine(form), seeded(rig)
    start = engine.markers.start
    opened = [replace(request, prompt_ids=[*request.prompt_ids, start]) for request in requests]
    free = engine.generate(requests, short(sampling))
    forced = engine.generate(requests, short(sampling, FORCED))
    wanted = engine.generate(opened, replace(short(sampling), max_tokens=15))
    assert sum(span_counts(free, start)) <= 1, "the control: untrained weights hardly open a span"
    for mine, theirs in zip(forced, wanted, strict=True):
        assert mine.completion_ids == (start, *theirs.completion_ids)
        assert (mine.forced[0], mine.logprobs[0]) == (True, 0.0)
        assert torch.equal(mine.forced[1:], theirs.forced)
        assert torch.allclose(mine.logprobs[1:], theirs.logprobs, atol=1e-4)
        assert mine.latent_positions == theirs.latent_positions
        assert len(mine.latents) > 0
        assert torch.allclose(mine.latents, theirs.latents, atol=1e-3)
        assert mine.stop_reason is theirs.stop_reason
        assert (mine.latent_start, mine.uncut) == (FORCED, None)
    report = check_parity(engine, rig.model, requests, short(sampling, FORCED), rollouts=forced)
    assert report.passes(), report


def test_only_the_first_span_is_forced(rig: Rig, form: Any) -> None:
    engine, requests = rig.engine(form), seeded(rig)
    with rig.thinking(form, end=2.0):
        rollouts = engine.generate(requests, replace(SAMPLED, max_tokens=24, latent_start=FORCED))
    later = 0
    for rollout in rollouts:
        starts = [i for i, token in enumerate(rollout.completion_ids) if token == engine.markers.start]
        assert rollout.forced[starts].tolist() == [True, *[False] * (len(starts) - 1)]
        later += len(starts) - 1
    assert later > 0


def test_a_prompt_inside_a_span_has_its_start_already(rig: Rig, form: Any) -> None:
    engine = rig.engine(form)
    opened = [replace(r, prompt_ids=[*r.prompt_ids, engine.markers.start]) for r in seeded(rig)]
    free, forced = (engine.generate(opened, short(SAMPLED, start)) for start in (FREE, FORCED))
    assert all(same(replace(a, latent_start=FREE), b, 0.0) for a, b in zip(forced, free, strict=True))


@pytest.mark.parametrize("kind", [k for k in Intervention if k is not Intervention.NONE])
def test_every_intervention_acts_on_a_forced_span(rig: Rig, form: Any, kind: Intervention) -> None:
    engine = rig.engine(form)
    markers, filler = engine.markers, rig.tokenizer.encode(" red", add_special_tokens=False)[0]
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(9)) if kind.needs_vectors else None
    request = replace(rig.requests()[0], intervention=kind, vectors=vectors, filler_id=filler, seed=4)
    rollout = engine.generate([request], replace(short(SAMPLED, FORCED), max_tokens=8))[0]
    if kind is Intervention.PLAIN_TOKENS:
        size = form.slots + 2
        assert rollout.completion_ids[:size] == (filler,) * size
        assert rollout.forced[:size].all()
    elif kind is Intervention.SKIP:
        assert rollout.completion_ids[:2] == (markers.start, markers.end)
        assert rollout.forced[:2].all()
    else:
        assert rollout.completion_ids[:2] == (markers.start, markers.slot) or form.length == "free"
        assert rollout.completion_ids[0] == markers.start
    assert bool(len(rollout.latents)) == kind.feeds_vectors
    if vectors is not None:
        assert torch.equal(rollout.latents[0], vectors[0])


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_forced_start_is_one_of_max_tokens(rig: Rig, form: Any, limit: int) -> None:
    engine = rig.engine(form)
    for rollout in engine.generate(seeded(rig), replace(short(SAMPLED, FORCED), max_tokens=limit)):
        assert rollout.completion_ids[0] == engine.markers.start
        assert len(rollout.completion_ids) <= limit
        assert limit > 1 or rollout.stop_reason is StopReason.LENGTH
        assert len(rollout.latent_positions) == (limit == 1 and form.first == "before_start") or limit > 1


# ---- forbidden and biased


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, PENALISED], ids=["sampled", "greedy", "penalised"])
def test_forbidden_is_what_the_intervention_none_does(rig: Rig, sampling: Sampling) -> None:
    engine = rig.engine()
    with rig.thinking():
        free = engine.generate(seeded(rig), short(sampling))
        forbidden = engine.generate(seeded(rig), short(sampling, FORBIDDEN))
        none = engine.generate(seeded(rig, intervention=Intervention.NONE), short(sampling))
        report = check_parity(engine, rig.model, seeded(rig), short(sampling, FORBIDDEN), rollouts=forbidden)
    assert sum(span_counts(free, engine.markers.start)) >= 4, "the control"
    assert sum(span_counts(forbidden, engine.markers.start)) == 0
    assert all(same(a, b, 1e-6) for a, b in zip(forbidden, none, strict=True))
    assert max(report.max_dlogp, report.max_duncut, report.max_dkept) < 1e-4


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, PENALISED], ids=["sampled", "greedy", "penalised"])
@pytest.mark.parametrize("form", ["fixed", "before_start"], indirect=True)
def test_a_bias_is_one_on_the_head(rig: Rig, form: Any, sampling: Sampling) -> None:
    """Outside of spans, where a head's bias has nothing to decide in `fixed` length."""
    engine, requests = rig.engine(form), seeded(rig)
    start, base = engine.markers.start, 3.0
    counts = []
    for wanted in (MORE, FREE, LESS):
        with rig.thinking(form, start=base):
            mine = engine.generate(requests, short(sampling, wanted))
        with rig.thinking(form, start=base + wanted.bias):
            theirs = engine.generate(requests, short(sampling))
        for a, b in zip(mine, theirs, strict=True):
            assert (a.ids, a.latent_positions) == (b.ids, b.latent_positions)
            assert torch.equal(a.forced, b.forced)
            assert torch.allclose(a.logprobs, b.logprobs, atol=1e-4)
            assert torch.allclose(a.latents, b.latents, atol=1e-3)
            assert (a.uncut is None) == (wanted is FREE and not sampling.distorts)
        counts.append(sum(span_counts(mine, start)))
    assert counts[0] > counts[1] >= counts[2]
    assert counts[0] > counts[2]


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, PENALISED], ids=["sampled", "greedy", "penalised"])
@pytest.mark.parametrize("wanted", [MORE, LESS], ids=str)
def test_the_log_probs_before_a_bias_are_those_of_a_plain_pass(
    rig: Rig, form: Any, wanted: LatentStart, sampling: Sampling
) -> None:
    engine, requests = rig.engine(form), seeded(rig)
    start = 2.0 if wanted is MORE else 8.0
    with rig.thinking(form, start=start, end=2.0):
        rollouts = engine.generate(requests, short(sampling, wanted))
        plain = [plain_logprobs(rig, r, q.images, engine.markers) for r, q in zip(rollouts, requests, strict=True)]
        report = check_parity(engine, rig.model, requests, short(sampling, wanted), rollouts=rollouts)
    assert max(report.max_dlogp, report.max_duncut, report.max_dkept, report.max_dh) < 1e-4
    temperature = sampling.temperature or 1.0
    apart = 0.0
    for rollout, logits in zip(rollouts, plain, strict=True):
        assert rollout.uncut is not None
        ids = torch.tensor(rollout.completion_ids)
        drawn = ~rollout.forced & (ids != engine.markers.slot) & (ids != engine.markers.end)
        exact = (logits / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(rollout.uncut.logprobs[drawn], exact[drawn].float(), atol=1e-4)
        assert not rollout.uncut.logprobs[rollout.forced].any()
        if not replace(sampling, latent_start=FREE).distorts:
            assert not rollout.uncut.log_kept_mass.any()
            biased = logits.clone()
            biased[:, engine.markers.start] += wanted.bias
            there = (biased / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            assert torch.allclose(rollout.logprobs[drawn], there[drawn].float(), atol=1e-4)
        apart = max(apart, float((rollout.uncut.logprobs - rollout.logprobs)[drawn].abs().max()))
    assert apart > 0.1, "the control: the two distributions differ"


def plain_logprobs(rig: Rig, rollout: Rollout, images: Any, markers: Any) -> torch.Tensor:
    """[C, V] float64 logits of one parallel pass before each token of the completion; what no engine draws is out."""
    with torch.no_grad():
        hidden = forward_hidden(rig.model, replay_batch(rig.model, [rollout], [images]), markers)[0]
        logits = rig.family.head(rig.model)(hidden)[len(rollout.prompt_ids) - 1 : -1].double()
    logits[:, list(markers.never_sampled)] = -torch.inf
    return logits


def test_a_bias_of_zero_is_free(rig: Rig, form: Any) -> None:
    engine = rig.engine(form)
    with rig.thinking(form):
        for sampling in (SAMPLED, PENALISED):
            free, zero = (engine.generate(seeded(rig), short(sampling, start)) for start in (FREE, ZERO))
            assert all(same(a, b, 0.0) for a, b in zip(free, zero, strict=True))
            assert all((a.uncut is None) == (b.uncut is None) for a, b in zip(free, zero, strict=True))


# ---- several in one call


def test_requests_of_one_call_have_a_start_each(rig: Rig, form: Any) -> None:
    engine = rig.engine(form)
    (base,) = rig.requests([([], "what is next from red")])
    starts = [None, FORCED, FORBIDDEN, MORE, LESS, ZERO, FREE]
    requests = [replace(base, latent_start=start, seed=3) for start in starts]
    with rig.thinking(form, start=3.0):
        together = engine.generate(requests, short(SAMPLED, FORCED))
        alone = [engine.generate([request], short(SAMPLED, FORCED))[0] for request in requests]
    assert [r.latent_start for r in together] == [FORCED, *starts[1:]]
    assert all(same(a, b, 2e-4) for a, b in zip(together, alone, strict=True))
    assert same(together[0], together[1], 0.0)
    assert same(together[5], together[6], 0.0)
    assert [r.uncut is None for r in together] == [True, True, True, False, False, True, True]
    assert len({together[row].completion_ids for row in (1, 2, 3)}) == 3, "the control"


# ---- refusals


def test_what_makes_no_sense_is_refused(rig: Rig) -> None:
    (base,) = rig.requests([([], "yellow")])
    good = replace(base, latent_start=FORBIDDEN)
    engine = rig.engine()
    for start in (FORCED, MORE):
        with pytest.raises(UserError, match=f"request 1: latent_start is '{start}', but intervention 'none' forbids"):
            engine.generate([good, replace(base, intervention=Intervention.NONE)], short(SAMPLED, start))
        with pytest.raises(UserError, match=f"request 0: latent_start is '{start}', but latent format 'slots' gener"):
            rig.engine(get_format("slots")).generate([base], short(SAMPLED, start))
    none = replace(base, intervention=Intervention.NONE, latent_start=FREE)
    assert engine.generate([none], short(SAMPLED, FORCED))
    assert rig.engine(get_format("slots")).generate([good], short(SAMPLED))
