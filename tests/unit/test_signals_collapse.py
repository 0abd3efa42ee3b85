"""Paper C's collapse, between samples, and what `latent_span_cosine` says of the same latents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import Scored
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.types import Rollout, StopReason
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
    def rollout(latents: torch.Tensor) -> Rollout:
        count = len(latents)
        return Rollout(
            prompt_ids=(1,),
            completion_ids=(2,) * (count + 1),
            logprobs=torch.zeros(count + 1),
            forced=torch.zeros(count + 1, dtype=torch.bool),
            latents=latents,
            latent_positions=tuple(range(1, count + 1)),
            stop_reason=StopReason.EOS,
            seed=0,
            sigma=0.0,
            intervention=Intervention.OWN,
        )

    span = torch.randn(K, H, generator=torch.Generator().manual_seed(0))
    same, none = rollout(span), rollout(torch.zeros(0, H))
    found = Scored([same, none, same, rollout(-span)], [""] * 4, [True] * 4).collapse
    assert found is not None
    assert found.pairs == 3
    assert found.cosine == pytest.approx(-1 / 3)
    assert Scored([same, none], [""] * 2, [True] * 2).collapse is None


def test_the_old_name_is_refused_with_the_new_one() -> None:
    with pytest.raises(UserError, match="'latent_cosine' is now called latent_span_cosine"):
        parse_signals(["latent_cosine"])
    with pytest.raises(UserError, match="latent/collapse"):
        parse_signals([{"latent_cosine": {"space": "hidden"}}])
