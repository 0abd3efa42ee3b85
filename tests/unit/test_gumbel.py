"""The noise behind sampled tokens: vLLM's own kernels give the same numbers, and draws follow the softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample, murmur3_uniform32

from rl_lvr.rollout import gumbel
from rl_lvr.rollout.sampling import decide, draw

DEVICE = "cpu" if torch.version.cuda is None else "cuda"
SEEDS = (0, 1, 1234, -5, 2**31, 2**48 - 3, 2**63 - 1, -(2**63))
POSITIONS = (0, 1, 77, 4095, 2**29)


@triton.jit
def _uniform_kernel(output_ptr, seeds_ptr, positions_ptr, size, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, BLOCK)
    numbers = murmur3_uniform32(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tokens)
    tl.store(output_ptr + row * size + tokens, numbers, mask=tokens < size)


@pytest.fixture(scope="module")
def keys():
    pairs = [(seed, position) for seed in SEEDS for position in POSITIONS]
    return tuple(torch.tensor(column, device=DEVICE) for column in zip(*pairs, strict=True))


def theirs(logits, seeds, positions):
    rows = torch.arange(len(logits), dtype=torch.int32, device=DEVICE)
    ones = torch.ones(len(logits), device=DEVICE)
    return gumbel_sample(logits, rows, ones, seeds, positions, apply_temperature=False, is_drafting=False)


def test_uniforms_are_those_of_vllms_kernel_bit_for_bit(keys):
    size = 1000
    expected = torch.empty(len(keys[0]), size, device=DEVICE)
    _uniform_kernel[(len(keys[0]),)](expected, *keys, size, BLOCK=1024)
    tokens = torch.arange(size, device=DEVICE)
    assert torch.equal(gumbel.uniform(*keys, tokens), expected)
    for other in ((keys[0] + 1, keys[1]), (keys[0], keys[1] + 1), (keys[0] ^ 2**40, keys[1])):
        assert (gumbel.uniform(*other, tokens) == expected).float().mean() < 0.01


@pytest.mark.parametrize("vocabulary", [7, 300, 3000])
def test_tokens_are_those_of_vllms_sampler(keys, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (2 * torch.randn(len(keys[0]), vocabulary, generator=generator)).to(DEVICE)
    logits[:, 3] = float("-inf")
    expected = theirs(logits, *keys)
    assert torch.equal(gumbel.noised_argmax(logits, *keys), expected)
    token, logprobs = draw(logits, keys[0], keys[1] + 1, greedy=False)
    assert torch.equal(token, expected)  # vLLM keys by the position of the last token, `draw` by that of the next
    assert torch.equal(logprobs, logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
    assert (gumbel.noised_argmax(logits, keys[0] + 1, keys[1]) != expected).any()


def test_the_pieces_of_a_vocabulary_change_nothing(keys, monkeypatch):
    logits = torch.randn(len(keys[0]), 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    whole = gumbel.noised_argmax(logits, *keys)
    monkeypatch.setattr(gumbel, "_CHUNK", 40 * 512)
    assert torch.equal(gumbel.noised_argmax(logits, *keys), whole)


def test_temporaries_are_of_a_pieces_size(monkeypatch):
    """As `_CHUNK` says: 64 rows of a large vocabulary would otherwise take their size many times over."""
    seen = []
    monkeypatch.setattr(gumbel, "_CHUNK", 1 << 12)
    monkeypatch.setattr(gumbel, "gumbel", lambda *key, real=gumbel.gumbel: seen.append(made := real(*key)) or made)
    gumbel.noised_argmax(torch.zeros(64, 1000), torch.arange(64), torch.arange(64))
    assert max(noise.numel() for noise in seen) <= 1 << 12
    assert sum(noise.numel() for noise in seen) == 64 * 1000


def test_noise_is_gumbels():
    seeds = torch.arange(400)
    noise = gumbel.gumbel(seeds, seeds * 3, torch.arange(500)).flatten().double()
    assert noise.isfinite().all()
    cdf = torch.exp(-torch.exp(-noise.sort().values))
    steps = (torch.arange(len(noise)) + 0.5) / len(noise)
    assert (cdf - steps).abs().max() < 1.63 / len(noise) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert (cdf**1.02 - steps).abs().max() > 1.63 / len(noise) ** 0.5  # the control


def chi_square(token, probabilities):
    expected = probabilities * len(token)
    return float(((token.bincount(minlength=len(probabilities)) - expected) ** 2 / expected).sum())


def test_draws_follow_the_softmax():
    """20 tokens, 40,000 draws over seeds and positions: chi-square with 19 degrees of freedom, 43.8 at 0.1 %."""
    n = 40_000
    logits = 1.5 * torch.randn(20, generator=torch.Generator().manual_seed(3))
    seeds, positions = torch.arange(n) % 200, torch.arange(n) // 200
    token, _ = draw(logits.expand(n, -1), seeds, positions, greedy=False)
    assert chi_square(token, logits.double().softmax(-1)) < 43.8
    assert chi_square(token, (logits * 1.05).double().softmax(-1)) > 43.8  # the control


@given(logit=st.floats(-8, 8), seed=st.integers(-(2**63), 2**63 - 1))
def test_a_decision_between_two_is_keyed_and_follows_the_softmax(logit, seed):
    n = 2000
    pairs = torch.tensor([[logit, 0.0]]).expand(n, -1)
    seeds, positions = torch.full((n,), seed), torch.arange(n)
    index, logprobs = decide(pairs, seeds, positions, greedy=False)
    probability = float(torch.sigmoid(torch.tensor(logit, dtype=torch.float64)))
    spread = (probability * (1 - probability) / n) ** 0.5
    assert abs(float((index == 0).float().mean()) - probability) < 5.5 * spread + 2 / n
    assert torch.equal(logprobs, pairs.log_softmax(-1).gather(1, index[:, None])[:, 0])
    assert torch.equal(decide(pairs.flip(0), seeds, positions, greedy=False)[0], index)


def test_a_decision_never_takes_what_is_ruled_out():
    pairs = torch.tensor([[0.0, float("-inf")], [float("-inf"), 0.0]])
    for seed in range(500):
        seeds, positions = torch.full((2,), seed), torch.arange(2)
        assert decide(pairs, seeds, positions, greedy=False)[0].tolist() == [0, 1]
    assert decide(pairs, seeds, positions, greedy=True)[0].tolist() == [0, 1]
