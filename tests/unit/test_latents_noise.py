"""Keyed noise: standard normal, a function of its key alone, and the same as a reference in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lvr.latents.noise import keyed_normal, keyed_uniform

WORD = 2**64 - 1


def splitmix(x: int) -> int:
    """SplitMix64 on Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference(seed: int, position: int, size: int) -> list[float]:
    key = splitmix(splitmix(seed & WORD) ^ (position & WORD))
    pairs = (size + 1) // 2
    words = [splitmix((key + i * 0x9E3779B97F4A7C15) & WORD) for i in range(2 * pairs)]
    uniform = [((word >> 12) + 0.5) / 2**52 for word in words]
    radius = [math.sqrt(-2 * math.log(u)) for u in uniform[:pairs]]
    angle = [2 * math.pi * u for u in uniform[pairs:]]
    both = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    both += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    return both[:size]


def keys(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def ks_distance(sample: Tensor, cdf: np.ufunc | None = None) -> float:
    """Kolmogorov-Smirnov distance of a sample from the standard normal (or from `cdf`), times sqrt(n)."""
    x = np.sort(sample.double().numpy().ravel())
    normal = 0.5 * (1 + torch.erf(torch.from_numpy(x) / math.sqrt(2)).numpy())
    expected = normal if cdf is None else cdf(x)
    steps = np.arange(len(x) + 1) / len(x)
    return float(max(np.max(steps[1:] - expected), np.max(expected - steps[:-1])) * math.sqrt(len(x)))


KS_LIMIT = 1.95  # exceeded by one true sample in a thousand; the seeds here are fixed


# ---- distribution


def test_moments_and_shape_of_the_distribution() -> None:
    rows = torch.arange(400)
    z = keyed_normal(rows, torch.zeros_like(rows), 500).double()
    n = z.numel()
    assert abs(z.mean().item()) < 4 / math.sqrt(n)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean().item()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / n)
    assert z.abs().max() > 4.2  # tails: 200,000 normals without one beyond 4.2 are as likely as exp(-5)
    assert ks_distance(z) < KS_LIMIT


def test_the_distance_rejects_what_is_not_normal() -> None:
    """Negative control: uniform noise of the same moments, and normals that are off by a little."""
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(200_000, generator=generator) * 2 - 1) * math.sqrt(3)
    normal = torch.randn(200_000, generator=generator)
    assert ks_distance(normal) < KS_LIMIT
    assert ks_distance(uniform) > 10
    assert ks_distance(normal * 1.05) > KS_LIMIT
    assert ks_distance(normal + 0.02) > KS_LIMIT


def test_elements_of_a_vector_and_neighbouring_keys_are_uncorrelated() -> None:
    rows, n = torch.arange(500), 500 * 64
    z = keyed_normal(rows, torch.zeros_like(rows), 64)
    other_position = keyed_normal(rows, torch.ones_like(rows), 64)
    other_seed = keyed_normal(rows + 1, torch.zeros_like(rows), 64)
    transposed = keyed_normal(torch.zeros_like(rows), rows, 64)
    limit = 4 / math.sqrt(n)
    for other in (other_position, transposed):
        assert abs((z * other).mean().item()) < limit
        assert abs((z**2 * other**2).mean().item() - 1) < 4 * math.sqrt(8 / n)
    assert torch.equal(z[1:], other_seed[:-1])  # the control: the same keys give a correlation of 1
    assert abs((z[:, ::2] * z[:, 1::2]).mean().item()) < limit * math.sqrt(2)
    assert abs((z[:, :32] * z[:, 32:]).mean().item()) < limit * math.sqrt(2)  # cosine against sine of one pair
    assert abs((z[1:] * z[:-1]).mean().item()) < limit * 1.01


def test_seed_and_position_do_not_change_places() -> None:
    one, two = keyed_normal(keys(1), keys(2), 8), keyed_normal(keys(2), keys(1), 8)
    assert not torch.equal(one, two)


# ---- keyed


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31)), min_size=1, max_size=9),
    st.integers(1, 37),
    st.randoms(use_true_random=False),
)
def test_a_vector_depends_on_its_key_alone(pairs: list[tuple[int, int]], size: int, random: object) -> None:
    """Bit for bit the same alone, in a batch, in a shuffled batch, and as a view that is not contiguous."""
    seeds, positions = keys(*(s for s, _ in pairs)), keys(*(p for _, p in pairs))
    batch = keyed_normal(seeds, positions, size)
    order = list(range(len(pairs)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert torch.equal(keyed_normal(seeds[order], positions[order], size), batch[order])
    for row in range(len(pairs)):
        assert torch.equal(keyed_normal(seeds[row : row + 1], positions[row : row + 1], size)[0], batch[row])
    strided = torch.stack([seeds, positions], 1)
    assert torch.equal(keyed_normal(strided[:, 0], strided[:, 1], size), batch)


@settings(max_examples=60)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62), st.integers(0, 33))
def test_agreement_with_plain_python(seed: int, position: int, size: int) -> None:
    got = keyed_normal(keys(seed), keys(position), size)
    assert got.shape == (1, size)
    assert got.dtype == torch.float32
    assert got[0].tolist() == pytest.approx(reference(seed, position, size), rel=1e-6, abs=1e-7)


def test_the_reference_notices_another_key() -> None:
    """Negative control of the test above."""
    got = keyed_normal(keys(3), keys(5), 8)[0].tolist()
    assert got == pytest.approx(reference(3, 5, 8), rel=1e-6)
    assert got != pytest.approx(reference(3, 6, 8), rel=1e-2)


def test_odd_sizes_have_no_constant_column() -> None:
    z = keyed_normal(torch.arange(300), torch.zeros(300, dtype=torch.long), 7)
    assert z.shape == (300, 7)
    assert (z.std(0) - 1).abs().max() < 0.2


# ---- uniform


def test_uniform_is_uniform_and_open() -> None:
    rows = torch.arange(50_000)
    u = keyed_uniform(rows, torch.zeros_like(rows))
    assert u.dtype == torch.float64
    assert 0 < u.min() < 1e-4 < 1 - 1e-4 < u.max() < 1
    assert ks_distance(u, lambda x: x) < KS_LIMIT
    assert ks_distance(u**1.05, lambda x: x) > KS_LIMIT  # the control


def test_uniform_agrees_with_plain_python_and_is_not_the_stream_of_the_normals() -> None:
    for seed, position in ((0, 0), (-1, 7), (2**63 - 1, 12345)):
        key = splitmix(splitmix(seed & WORD) ^ position)
        expected = ((splitmix(key ^ 0xBF58476D1CE4E5B9) >> 12) + 0.5) / 2**52
        assert keyed_uniform(keys(seed), keys(position)).item() == expected
        assert ((splitmix(key) >> 12) + 0.5) / 2**52 != expected


def test_the_extreme_words_stay_inside_the_open_interval() -> None:
    """All bits set and none set: in float32, or with 53 bits, the half step would round up to 1."""
    from rl_lvr.latents.noise import _uniform

    low, high = _uniform(torch.tensor([0, -1])).tolist()
    assert 0 < low < high < 1
