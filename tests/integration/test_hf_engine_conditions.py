"""Conditions: donors with other answers, means, and that the engine is given exactly those."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine_cases import FORMATS, SAMPLED, Rig, same
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.conditions import derangement, mean_latents, own_latents, run_condition, swapped


@pytest.fixture(scope="module")
def rig(load_tiny) -> Rig:
    return Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))


@pytest.fixture
def forced(rig):
    """An engine and six prompts that end in START, so that every row makes latents."""
    engine = rig.engine()
    return engine, [replace(r, prompt_ids=[*r.prompt_ids, engine.markers.start]) for r in rig.requests()]


# ---- donors


@settings(max_examples=200)
@given(answers=st.lists(st.integers(0, 4), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_every_donor_is_used_once_and_has_another_answer(answers, seed):
    most = Counter(answers).most_common(1)[0][1]
    if 2 * most > len(answers):
        with pytest.raises(UserError, match="more than half"):
            derangement(answers, seed)
        return
    donors = derangement(answers, seed)
    assert sorted(donors) == list(range(len(answers)))
    assert all(answers[donor] != answer for donor, answer in zip(donors, answers, strict=True))
    assert donors == derangement(answers, seed)


def test_another_seed_gives_other_donors():
    answers = list(range(30))
    assert len({tuple(derangement(answers, seed)) for seed in range(5)}) == 5


def test_rows_without_latents_get_a_donor_and_give_none():
    latents = [torch.full((n, 2), float(i)) for i, n in enumerate((2, 0, 3, 1, 0, 2))]
    answers = ["a", "a", "b", "a", "b", "b"]
    given_ = swapped(latents, answers, 0)
    donors = [int(vectors[0, 0]) for vectors in given_]
    assert all(answers[donor] != answer for donor, answer in zip(donors, answers, strict=True))
    assert not {1, 4} & set(donors)
    assert sorted(donors[i] for i in (0, 2, 3, 5)) == [0, 2, 3, 5]
    with pytest.raises(UserError, match="nothing to exchange"):
        swapped([torch.zeros(0, 2)] * 3, None, 0)


def test_mean_per_latent():
    rows = [torch.tensor([[1.0], [10.0]]), torch.tensor([[3.0]]), torch.zeros(0, 1)]
    assert mean_latents(rows).tolist() == [[2.0], [10.0]]
    with pytest.raises(UserError, match="nothing to average"):
        mean_latents([torch.zeros(0, 1)])


# ---- through the engine


def test_swap_feeds_the_latents_of_a_row_with_another_answer(forced):
    engine, requests = forced
    answers = ["x", "y", "x", "y", "z", "z"]
    sampling = replace(SAMPLED, max_tokens=6)
    own = engine.generate(requests, sampling)
    swap = run_condition(engine, requests, sampling, Intervention.SWAP, answers=answers)
    reused = run_condition(engine, requests, sampling, Intervention.SWAP, answers=answers, own=own)
    assert all(same(a, b) for a, b in zip(swap, reused, strict=True))
    for row, rollout in enumerate(swap):
        donor = [i for i, other in enumerate(own) if torch.allclose(other.latents[:3], rollout.latents[:3], atol=1e-5)]
        assert len(donor) == 1
        assert answers[donor[0]] != answers[row]
        assert rollout.seed == own[row].seed


def test_mean_feeds_the_mean_and_oracle_its_own_row(forced):
    engine, requests = forced
    sampling = replace(SAMPLED, max_tokens=6)
    own = run_condition(engine, requests, sampling, Intervention.OWN)
    mean = run_condition(engine, requests, sampling, Intervention.MEAN, own=own)
    expected = torch.stack([r.latents[:3] for r in own]).mean(0)
    assert all(torch.allclose(r.latents[:3], expected, atol=1e-5) for r in mean)
    oracles = list(torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(0)))
    oracle = run_condition(engine, requests, sampling, Intervention.ORACLE, oracles=oracles)
    assert all(torch.equal(r.latents[:3], vectors) for r, vectors in zip(oracle, oracles, strict=True))


def test_prompt_latents_are_not_donated(rig):
    engine = rig.engine()
    base = rig.requests()[0]
    ids = [*base.prompt_ids, *engine.markers.span(), engine.markers.start]
    at = len(base.prompt_ids) + 1
    request = replace(base, prompt_ids=ids, prompt_latents=(torch.ones(3, 64), range(at, at + 3)))
    rollout = engine.generate([request], replace(SAMPLED, max_tokens=4))[0]
    assert len(rollout.latents) == 6
    assert torch.equal(own_latents(request, rollout), rollout.latents[3:])


def test_conditions_without_vectors_and_their_seeds(rig):
    engine, requests = rig.engine(), rig.requests()
    filler = rig.tokenizer.encode(" red", add_special_tokens=False)[0]
    with rig.thinking():
        own = run_condition(engine, requests, SAMPLED, Intervention.OWN)
        plain = run_condition(engine, requests, SAMPLED, Intervention.PLAIN_TOKENS, filler_id=filler)
        none = run_condition(engine, requests, SAMPLED, Intervention.NONE)
    assert [r.seed for r in own] == [r.seed for r in plain] == [r.seed for r in none] == list(range(7, 13))
    assert all(engine.markers.start not in r.completion_ids for r in (*plain, *none))
    assert any(engine.markers.start in r.completion_ids for r in own)


def test_what_is_missing_is_said(forced):
    engine, requests = forced
    with pytest.raises(UserError, match="oracle vectors"):
        run_condition(engine, requests, SAMPLED, Intervention.ORACLE)
    with pytest.raises(UserError, match="2 answers for 6 requests"):
        run_condition(engine, requests, SAMPLED, Intervention.SWAP, answers=["a", "b"])
    with pytest.raises(UserError, match="more than half"):
        run_condition(engine, requests, replace(SAMPLED, max_tokens=5), Intervention.SWAP, answers=["a"] * 6)
    with pytest.raises(UserError, match=r"request 0: .*needs vectors"):
        run_condition(engine, requests, SAMPLED, Intervention.GIVEN)
