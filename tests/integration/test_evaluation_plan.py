"""Plans: donors of other answers and clusters, means, and that the engine is given exactly those, in two calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from engine_cases import ANSWERS, FORMATS, SAMPLED, Asked, Rig
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.evaluation import conditions
from rl_lvr.evaluation.conditions import (
    Condition,
    derangement,
    donors,
    exchange,
    filler_id,
    mean_latents,
    own_latents,
    parse_conditions,
)
from rl_lvr.evaluation.plan import Item, Plan
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import LatentStart

SHORT = replace(SAMPLED, max_tokens=6)


class Counted:
    """An engine that notes what it is asked for."""

    def __init__(self, engine):
        self.engine, self.markers = engine, engine.markers
        self.calls = []

    def generate(self, requests, sampling):
        self.calls.append(list(requests))
        return self.engine.generate(requests, sampling)


@pytest.fixture(scope="module")
def rig(load_tiny) -> Rig:
    return Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))


@pytest.fixture
def forced(rig):
    """An engine and six prompts that end in START, so that every row makes latents."""
    engine = Counted(rig.engine())
    return engine, [replace(r, prompt_ids=[*r.prompt_ids, engine.markers.start]) for r in rig.requests()]


def run(plan, engine, **more):
    return {one.item: one for call in plan.run(engine, **more) for one in call}


def of(answered, name):
    """The answers of a condition, in the order of the questions."""
    return [
        one for _, one in sorted((item.question, one) for item, one in answered.items() if item.condition.name == name)
    ]


# ---- donors


@settings(max_examples=200)
@given(answers=st.lists(st.integers(0, 4), min_size=2, max_size=40), seed=st.integers(0, 5))
def test_every_donor_is_used_once_and_has_another_answer_where_that_is_possible(answers, seed):
    found = exchange(answers, range(len(answers)), seed)
    assert sorted(found) == list(range(len(answers)))
    assert all(donor != place for place, donor in enumerate(found))
    same = sum(answers[donor] == answer for donor, answer in zip(found, answers, strict=True))
    most = Counter(answers).most_common(1)[0][1]
    assert same == max(0, 2 * most - len(answers))
    assert found == exchange(answers, range(len(answers)), seed)


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=30),
    seed=st.integers(0, 3),
    piece=st.sampled_from([8, 2048]),
)
def test_no_donor_is_of_the_same_cluster(rows, seed, piece):
    answers, clusters = zip(*rows, strict=True)
    if 2 * Counter(clusters).most_common(1)[0][1] > len(rows):
        with pytest.raises(UserError, match="more than half" if len(rows) > 1 else "nobody"):
            exchange(answers, clusters, seed)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditions, "PIECE", piece)
        found = exchange(answers, clusters, seed)
    assert sorted(found) == list(range(len(rows)))
    assert all(clusters[donor] != cluster for donor, cluster in zip(found, clusters, strict=True))


def test_clusters_are_other_donors_than_answers_alone_give():
    """Two rows of an image with two answers: without clusters each is the other's donor."""
    answers, clusters = ["a", "b", "a", "b"], ["1", "1", "2", "2"]
    alone = [exchange(answers, range(4), seed) for seed in range(8)]
    assert any(clusters[donor] == clusters[place] for found in alone for place, donor in enumerate(found))
    found = exchange(answers, clusters, 0)
    assert all(clusters[donor] != cluster for donor, cluster in zip(found, clusters, strict=True))
    assert all(answers[donor] != answer for donor, answer in zip(found, answers, strict=True))


def test_another_seed_gives_other_donors():
    answers = list(range(30))
    assert len({tuple(derangement(answers, seed)) for seed in range(5)}) == 5


def test_rows_without_latents_get_a_donor_and_give_none():
    made = [True, False, True, True, False, True]
    answers = ["a", "a", "b", "a", "b", "b"]
    found = donors(made, answers, None, 0)
    assert all(answers[donor] != answer for donor, answer in zip(found, answers, strict=True))
    assert not {1, 4} & set(found)
    assert sorted(found[i] for i in (0, 2, 3, 5)) == [0, 2, 3, 5]
    with pytest.raises(UserError, match="nothing to exchange"):
        donors([False] * 3, ["a", "b", "c"], None, 0)


def test_mean_per_latent():
    rows = [torch.tensor([[1.0], [10.0]]), torch.tensor([[3.0]]), torch.zeros(0, 1)]
    assert mean_latents(rows).tolist() == [[2.0], [10.0]]
    with pytest.raises(UserError, match="nothing to average"):
        mean_latents([torch.zeros(0, 1)])


def test_names_of_conditions():
    assert [c.name for c in parse_conditions("own, swap,own")] == ["own", "swap"]
    with pytest.raises(UserError, match="did you mean 'noise'"):
        parse_conditions("nose")
    with pytest.raises(UserError, match="--vectors"):
        parse_conditions(["given"])
    named = parse_conditions("own/forced, noise/bias=2.5,swap/bias -1,none,own/free")
    assert [c.name for c in named] == ["own/forced", "noise/bias=2.5", "swap/bias=-1", "none", "own/free"]
    assert [Condition.parse(c.name) for c in named] == named
    assert named[2].own == Condition.parse("own/bias=-1")
    for wrong, message in (("own/maybe", "latent_start is 'maybe'"), ("none/forced", "makes no block")):
        with pytest.raises(UserError, match=message):
            parse_conditions(wrong)


# ---- through the engine


def test_all_conditions_are_two_calls_and_swap_feeds_a_row_with_another_answer(forced):
    engine, requests = forced
    wanted = parse_conditions("swap,noise,mean,zeros")
    plan = Plan(Asked(requests), wanted, SHORT)
    found = run(plan, engine)
    assert [len(call) for call in engine.calls] == [18, 12]  # own, which swap and mean need, noise, zeros; then those
    kinds = [request.intervention.value for request in engine.calls[0][:6]]
    assert kinds == ["own", "noise", "zeros"] * 2  # of a question next to each other
    # A prefix cache without room for all prompts still holds the last ones, so these come first.
    assert [request.seed - 7 for request in engine.calls[1]] == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    own, swap, mean = (of(found, name) for name in ("own", "swap", "mean"))
    for row, one in enumerate(swap):
        assert ANSWERS[one.donor] != ANSWERS[row]
        assert torch.equal(one.rollout.latents[:3], own[one.donor].rollout.latents[:3])
        assert one.rollout.seed == own[row].rollout.seed == 7 + row
    expected = torch.stack([one.rollout.latents[:3] for one in own]).mean(0)
    assert all(torch.allclose(one.rollout.latents[:3], expected, atol=1e-5) for one in mean)
    assert plan.undefined == {}


def test_a_plan_in_small_calls_gives_the_same_and_goes_on_where_it_stopped(forced):
    engine, requests = forced
    wanted = parse_conditions("own,swap")
    whole = run(Plan(Asked(requests), wanted, SHORT, samples=2), engine)
    engine.calls.clear()
    pieces = run(Plan(Asked(requests), wanted, SHORT, samples=2, at_once=5), engine)
    assert max(map(len, engine.calls)) <= 5
    assert whole.keys() == pieces.keys()
    assert all(whole[item].rollout.ids == pieces[item].rollout.ids for item in whole)
    # Half is done, and the latents of a part of that are at hand: the others are made once more, swaps are the same.
    done = {item for item in whole if item.condition.name == "own" or item.question < 3}
    own = {item: whole[item].latents for item in done if item.condition.name == "own" and item.question > 0}
    engine.calls.clear()
    rest = run(Plan(Asked(requests), wanted, SHORT, samples=2), engine, done=done.__contains__, own=own)
    assert {item.question for item in rest if item.condition.name == "own"} == {0}
    left = [item for item in rest if item.condition.name == "swap"]
    assert len(left) == 6
    assert all(whole[item].rollout.ids == rest[item].rollout.ids for item in left)
    apart = [(whole[item].latents - rest[item].latents).abs().max() for item in left]
    assert max(apart) < 1e-4, apart
    assert len(run(Plan(Asked(requests), wanted, SHORT, samples=2), engine, done=lambda item: True)) == 0


def test_samples_have_seeds_of_their_own_and_swap_within_a_sample(forced):
    engine, requests = forced
    plan = Plan(Asked(requests), parse_conditions("own,swap"), SHORT, samples=2)
    found = run(plan, engine)
    assert len({plan.seed(item) for item in found}) == 12
    for sample in (0, 1):
        one = found[Item(0, Condition(Intervention.SWAP), sample)]
        donor = found[Item(one.donor, Condition(), sample)]
        assert torch.equal(one.rollout.latents[:3], donor.rollout.latents[:3])
    assert found[Item(0, Condition(), 0)].rollout.ids != found[Item(0, Condition(), 1)].rollout.ids


def test_oracle_feeds_each_row_its_own(forced):
    engine, requests = forced
    vectors = list(torch.randn(6, 3, 64, generator=torch.Generator().manual_seed(0)))
    plan = Plan(Asked(requests), parse_conditions("oracle"), SHORT, oracles=lambda rows: [vectors[r] for r in rows])
    found = of(run(plan, engine), "oracle")
    assert all(torch.equal(one.rollout.latents[:3], mine) for one, mine in zip(found, vectors, strict=True))


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
    engine = rig.engine()
    filler = filler_id(" red", rig.tokenizer)
    plan = Plan(Asked(rig.requests()), parse_conditions("own,plain_tokens,none"), SAMPLED, filler_id=filler)
    with rig.thinking():
        found = run(plan, engine)
    own, plain, none = ([one.rollout for one in of(found, name)] for name in ("own", "plain_tokens", "none"))
    assert [r.seed for r in own] == [r.seed for r in plain] == [r.seed for r in none] == list(range(7, 13))
    assert all(engine.markers.start not in r.completion_ids for r in (*plain, *none))
    assert any(engine.markers.start in r.completion_ids for r in own)


def test_start_is_a_part_of_a_condition(rig):
    """Donors are own latents under the same START. Control: without a word about it, rows draw START as they like."""
    engine, requests = Counted(rig.engine()), rig.requests()
    wanted = parse_conditions("own,own/forced,swap/forced,own/forbidden,none")
    found = run(Plan(Asked(requests), wanted, SHORT), engine)
    opens = {
        name: [engine.markers.start in one.rollout.completion_ids for one in of(found, name)]
        for name in ("own", "own/forced", "swap/forced", "own/forbidden", "none")
    }
    assert all(opens["own/forced"])
    assert all(opens["swap/forced"])
    assert not any(opens["own/forbidden"] + opens["none"])
    assert not all(opens["own"])
    own = of(found, "own/forced")
    for one in of(found, "swap/forced"):
        assert torch.equal(one.latents[:3], own[one.donor].latents[:3])
    engine.calls.clear()
    everywhere = replace(SHORT, latent_start=LatentStart.parse("forced"))
    found = run(Plan(Asked(requests), parse_conditions("own,zeros,none,own/free"), everywhere), engine)
    assert all(len(one.latents) >= 3 for name in ("own", "zeros") for one in of(found, name))
    assert not any(len(one.latents) for one in of(found, "none"))
    assert not all(len(one.latents) for one in of(found, "own/free"))


def test_what_is_missing_is_said(forced):
    engine, requests = forced
    asked = Asked(requests)
    with pytest.raises(UserError, match="vision tower"):
        Plan(asked, parse_conditions("oracle"), SHORT)
    with pytest.raises(UserError, match="filler_id"):
        Plan(asked, parse_conditions("plain_tokens"), SHORT)
    with pytest.raises(UserError, match="equal at temperature 0"):
        Plan(asked, parse_conditions("own"), replace(SHORT, temperature=0.0), samples=2)
    alike = Plan(Asked(requests, ["a"] * 6, ["c"] * 6), parse_conditions("own,swap"), SHORT)
    assert len(of(run(alike, engine), "swap")) == 0
    assert "more than half" in alike.undefined["swap"]
