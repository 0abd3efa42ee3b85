"""Sampling against transformers' own processors and warpers, and the keyed draw against the distribution it claims."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rl_lvr.errors import UserError
from rl_lvr.latents.starting import LatentStart
from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.types import Sampling

NO_IDS = torch.zeros(1, 0, dtype=torch.long)


def logits_of(seed: int, rows: int = 4, vocabulary: int = 50) -> torch.Tensor:
    return 3.0 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isinf(), theirs.isinf())  # the same tokens are kept
    assert torch.allclose(ours.softmax(-1), theirs.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 7, 49, 50, 1000])
def test_top_k(top_k):
    logits = logits_of(0)
    agree(draws.keep_top_k(logits, top_k), TopKLogitsWarper(top_k)(NO_IDS, logits))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(top_p):
    logits = logits_of(1)
    agree(draws.keep_top_p(logits, top_p), TopPLogitsWarper(top_p)(NO_IDS, logits))


@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.5, 1.0])
def test_min_p(min_p):
    logits = logits_of(2)
    agree(draws.keep_min_p(logits, min_p), MinPLogitsWarper(min_p)(NO_IDS, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty(penalty):
    logits = logits_of(3)
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    seen = draws.seen_tokens(ids.tolist(), 50, logits.device)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    agree(draws.penalise(logits, seen, penalty), theirs)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.2]),
)
def test_all_together_in_vllms_order(seed, temperature, top_k, top_p, min_p):
    logits = logits_of(seed)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    ours = draws.warp(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    agree(ours, chain(NO_IDS, logits))


def test_top_p_after_min_p_differs_from_the_other_order():
    """Why the order is said: what min-p drops no longer counts towards top-p."""
    logits = torch.tensor([[0.5, 0.3, 0.12, 0.08]]).log()
    ours = draws.warp(logits, Sampling(top_p=0.82, min_p=0.2))
    assert ours.isfinite().tolist() == [[True, True, False, False]]
    swapped = MinPLogitsWarper(0.2)(NO_IDS, TopPLogitsWarper(0.82)(NO_IDS, logits))
    assert swapped.isfinite().tolist() == [[True, True, True, False]]


def test_bans():
    logits = logits_of(4)
    banned = draws.ban(logits, torch.tensor([3, 40]))
    assert banned.isinf().nonzero()[:, 1].unique().tolist() == [3, 40]
    one = draws.ban_in_rows(logits, 7, torch.tensor([True, False, True, False]))
    assert one.isinf().nonzero().tolist() == [[0, 7], [2, 7]]
    assert not logits.isinf().any()
    seen = torch.ones(4, 50, dtype=torch.bool)
    for penalty in (0.5, 2.0):
        assert draws.penalise(banned, seen, penalty)[:, 3].isinf().all()  # a penalty does not lift a ban


def test_a_bias_is_added_to_one_token_of_a_row_and_lifts_no_ban():
    logits = draws.ban_in_rows(logits_of(4), 7, torch.tensor([True, False, True, False]))
    before = logits.clone()
    biased = draws.bias_in_rows(logits, 7, torch.tensor([3.0, 2.5, 0.0, -1.0]))
    assert torch.equal(logits, before)
    others = [token for token in range(50) if token != 7]
    assert torch.equal(biased[:, others], logits[:, others])
    assert torch.equal(biased[:, 7], logits[:, 7] + torch.tensor([3.0, 2.5, 0.0, -1.0]))
    assert biased[:, 7].isinf().tolist() == [True, False, True, False]


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    logits = logits_of(5)
    warped = draws.warp(logits, Sampling(temperature=0.0))
    token, logprob = draws.draw(warped, torch.arange(4), torch.arange(4), greedy=True)
    assert torch.equal(token, logits.argmax(-1))
    assert torch.allclose(logprob, logits.log_softmax(-1).amax(-1))


def test_draws_follow_the_distribution():
    n = 40_000
    logits = torch.tensor([[0.45, 0.0, 0.25, 0.2, 0.0, 0.1]]).log()
    seeds = torch.arange(n) % 200
    positions = torch.arange(n) // 200
    token, logprob = draws.draw(logits.expand(n, -1), seeds, positions, greedy=False)
    frequency = token.bincount(minlength=6) / n
    assert frequency[1] == 0
    assert frequency[4] == 0
    assert torch.allclose(frequency, logits[0].exp(), atol=0.01)
    assert torch.allclose(logprob, logits[0][token])
    # Neighbouring positions of one request, and neighbouring requests at one position, are independent.
    grid = (token == 0).float().view(200, 200)
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 0.03


def test_a_draw_depends_on_its_key_alone():
    logits = logits_of(6, rows=32)
    seeds, positions = torch.arange(32) * 7919, torch.arange(32) + 5
    token, logprob = draws.draw(logits, seeds, positions, greedy=False)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    again, same = draws.draw(logits[order], seeds[order], positions[order], greedy=False)
    assert torch.equal(token[order], again)
    assert torch.equal(logprob[order], same)
    alone = [int(draws.draw(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1], greedy=False)[0]) for i in order]
    assert alone == again.tolist()
    assert not torch.equal(token, draws.draw(logits, seeds + 1, positions, greedy=False)[0])
    assert not torch.equal(token, draws.draw(logits, seeds, positions + 1, greedy=False)[0])


def test_a_single_token_left_is_always_drawn():
    logits = torch.full((500, 9), float("-inf"))
    logits[:, 4] = -3.0
    token, logprob = draws.draw(logits, torch.arange(500), torch.arange(500), greedy=False)
    assert (token == 4).all()
    assert (logprob == 0).all()


def test_end_against_all_others():
    logits = logits_of(7)
    pair = draws.end_or_not(logits, 11).softmax(-1)
    assert torch.allclose(pair[:, 0], logits.softmax(-1)[:, 11], atol=1e-6)
    assert torch.allclose(pair.sum(-1), torch.ones(4))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 101},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"sigma": -1},
    ],
)
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([0.2, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.2]),
    penalty=st.sampled_from([1.0, 1.4]),
)
def test_log_probs_before_the_cut_and_the_kept_mass_equal_float64(seed, temperature, top_k, top_p, min_p, penalty):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits = draws.ban(logits_of(seed), torch.tensor([3, 7]))
    seen = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    warped = draws.warp(draws.penalise(logits, seen, penalty), sampling)
    token, logprobs = draws.draw(
        warped, torch.full((len(logits),), seed), torch.arange(1, len(logits) + 1), greedy=temperature == 0
    )
    before, kept = draws.uncut(draws.heat(logits, temperature), warped, token)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(-1)
    mass = exact.exp().masked_fill(warped.isinf(), 0.0).sum(-1)
    assert torch.allclose(before.double(), exact.gather(-1, token[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(kept.double(), mass.log(), atol=1e-5)
    if penalty == 1.0:
        assert torch.allclose(before, logprobs + kept, atol=1e-5)
    if not sampling.distorts or (penalty != 1.0 and (top_k, top_p, min_p) == (0, 1.0, 0.0)):
        assert not kept.any()
        assert torch.allclose(before, logprobs, atol=1e-6) or penalty != 1.0


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.0, "top_k": 5}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"min_p": 0.1}, True),
        ({"latent_start": LatentStart.parse("forced")}, False),
        ({"latent_start": LatentStart.parse("forbidden")}, False),
        ({"latent_start": LatentStart.parse("bias 0")}, False),
        ({"latent_start": LatentStart.parse("bias -1")}, True),
        ({"latent_start": LatentStart.parse("bias 1"), "temperature": 0.0}, True),
    ],
)
def test_which_settings_distort(settings_, expected):
    assert Sampling(**settings_).distorts is expected
