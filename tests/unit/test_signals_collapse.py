"""Paper C's collapse, between samples, and what `latent_span_cosine` says of the same latents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from rl_lvr.errors import UserError
from rl_lvr.evaluation.evaluate import collapse_of
from rl_lvr.signals import between_samples, parse_signals, pooled

H, K = 64, 4


def within(latents: torch.Tensor) -> float:
    """What `latent_span_cosine` is of one span (tests/integration/test_probe_measure.py holds it to that)."""
    pairs = itertools.combinations(range(len(latents)), 2)
    return float(torch.stack([cosine_similarity(latents[a], latents[b], dim=0) for a, b in pairs]).mean())


def figures(spans: list[torch.Tensor]) -> tuple[float, float]:
    """Collapse between samples, and the mean cosine within a span."""
    collapse = between_samples(torch.stack(list(map(pooled, spans))), range(len(spans))).cosine
    return collapse, sum(map(within, spans)) / len(spans)


def test_one_varied_span_for_every_image_is_collapsed() -> None:
    span = torch.randn(K, H, generator=torch.Generator().manual_seed(0))
    collapse, alike = figures([span.clone() for _ in range(6)])
    assert collapse == pytest.approx(1)
    assert abs(alike) < 0.3


def test_one_vector_per_image_is_not() -> None:
    draw = torch.Generator().manual_seed(0)
    collapse, alike = figures([torch.randn(1, H, generator=draw).expand(K, H) for _ in range(6)])
    assert abs(collapse) < 0.3
    assert alike == pytest.approx(1)


def test_it_is_the_mean_over_pairs_of_different_samples() -> None:
    draw = torch.Generator().manual_seed(1)
    vectors, samples = torch.randn(9, 16, generator=draw) + 1, [0, 0, 0, 4, 4, 7, 7, 7, 9]
    vectors[4] = 0  # without latents
    pairs = [
        float(cosine_similarity(vectors[a], vectors[b], dim=0))
        for a, b in itertools.combinations(range(9), 2)
        if samples[a] != samples[b] and 4 not in (a, b)
    ]
    found = between_samples(vectors, samples)
    assert found.pairs == len(pairs)
    assert found.cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    alone = between_samples(vectors[:3], samples[:3])  # completions of one prompt say nothing
    assert (alone.cosine, alone.pairs) == (0.0, 0)


def test_evaluation_has_it() -> None:
    span = torch.randn(K, H, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0, H)
    assert collapse_of(list(enumerate([span, none, span, -span]))) == pytest.approx(-1 / 3)
    assert collapse_of([(0, span), (1, none)]) is None
    assert collapse_of([(0, span), (0, -span)]) is None  # samples of one question


def test_the_old_name_is_refused_with_the_new_one() -> None:
    with pytest.raises(UserError, match="'latent_cosine' is now called latent_span_cosine"):
        parse_signals(["latent_cosine"])
    with pytest.raises(UserError, match="latent/collapse"):
        parse_signals([{"latent_cosine": {"space": "hidden"}}])
