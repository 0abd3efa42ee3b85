"""Latent objectives against formulas written out in float64."""

from __future__ import annotations

import math
import re

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.forward.objectives import (
    CONTRAST_TEMPERATURE,
    INFONCE_TEMPERATURE,
    LatentPairs,
    contrast,
    cosine,
    infonce,
    latent_objective,
    moving_targets,
    nmse,
    parse_objective,
)
from rl_lvr.models import family_of
from rl_lvr.training.runs.settings import freeze_vision
from rl_lvr.training.sft.config import LatentSFTConfig


@pytest.fixture
def pairs() -> LatentPairs:
    torch.manual_seed(0)
    return LatentPairs(torch.randn(5, 8, requires_grad=True), torch.randn(5, 8))


def test_nmse_is_one_for_the_mean_and_zero_for_the_target(pairs: LatentPairs) -> None:
    target = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)) * 3
    assert float(nmse(LatentPairs(target.mean().expand_as(target), target))) == pytest.approx(1.0, abs=1e-3)
    assert float(nmse(LatentPairs(target, target))) == 0.0
    by_hand = ((pairs.predicted.double() - pairs.target.double()) ** 2).mean() / pairs.target.double().var()
    assert float(nmse(pairs).detach()) == pytest.approx(float(by_hand.detach()), rel=1e-6)


def test_cosine(pairs: LatentPairs) -> None:
    rows = zip(pairs.predicted.detach().double(), pairs.target.double(), strict=True)
    by_hand = sum(1 - float(p @ t / (p.norm() * t.norm())) for p, t in rows) / 5
    assert float(cosine(pairs).detach()) == pytest.approx(by_hand, rel=1e-5)
    assert float(cosine(LatentPairs(2 * pairs.target, pairs.target))) == pytest.approx(0, abs=1e-6)


def test_infonce_counts_both_directions_and_leaves_equal_targets_out() -> None:
    torch.manual_seed(2)
    predicted, target = torch.randn(4, 8), torch.randn(4, 8)
    target[3] = 5 * target[1]  # the same direction: no negative of row 1, nor row 1 of it

    def loss(row: int, column_wise: bool) -> float:
        total = 0.0
        for other in range(4):
            if {row, other} == {1, 3}:
                continue
            p, t = (predicted[other], target[row]) if column_wise else (predicted[row], target[other])
            total += math.exp(float(p.double() @ t.double() / (p.norm() * t.norm())) / INFONCE_TEMPERATURE)
        own = float(predicted[row].double() @ target[row].double() / (predicted[row].norm() * target[row].norm()))
        return math.log(total) - own / INFONCE_TEMPERATURE

    by_hand = sum(loss(row, way) for row in range(4) for way in (False, True)) / 8
    assert float(infonce(LatentPairs(predicted, target))) == pytest.approx(by_hand, rel=1e-4)
    with_false_negative = target.clone()
    with_false_negative[3] = torch.randn(8)
    assert float(infonce(LatentPairs(predicted, with_false_negative))) != pytest.approx(by_hand, rel=1e-4)


def test_contrast_is_the_multi_positive_form_of_paper_a() -> None:
    torch.manual_seed(3)
    states, image = torch.randn(2, 8), torch.randn(4, 8)
    positive = torch.tensor([[True, True, False, False], [False, False, False, False]])
    negative = torch.tensor([[False, False, True, False], [True, True, True, True]])

    def score(column: int) -> float:
        s = float(states[0].double() @ image[column].double() / (states[0].norm() * image[column].norm()))
        return math.exp(s / CONTRAST_TEMPERATURE)

    chosen = score(0) + score(1)
    by_hand = -math.log(chosen / (chosen + score(2)))  # row 1 has no positive and is left out
    pairs = LatentPairs(states, image[:2], states, image, positive, negative)
    assert float(contrast(pairs)) == pytest.approx(by_hand, rel=1e-4)
    wrong = LatentPairs(states, image[:2], states, image, negative, positive)
    assert float(contrast(wrong)) != pytest.approx(by_hand, rel=1e-2)


def test_weighted_mix_and_an_empty_batch(pairs: LatentPairs) -> None:
    total, parts = latent_objective(pairs, {"nmse": 2.0, "cosine": 0.5})
    assert float(total.detach()) == pytest.approx(2 * float(parts["nmse"]) + 0.5 * float(parts["cosine"]), rel=1e-6)
    total.backward()
    assert float(pairs.predicted.grad.abs().sum()) > 0

    empty, parts = latent_objective(
        LatentPairs(torch.zeros(0, 8, requires_grad=True), torch.zeros(0, 8)), {"nmse": 1.0}
    )
    assert float(empty.detach()) == 0.0
    assert parts == {}
    empty.backward()  # a batch without latents still has a gradient path


@pytest.mark.parametrize("text", ["", "mse", "nmse:x", "nmse:-1", "nmse:nan"])
def test_bad_objectives_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_objective(text)


def test_objectives_are_parsed() -> None:
    assert parse_objective("nmse") == {"nmse": 1.0}
    assert parse_objective("nmse:1, infonce:0.1") == {"nmse": 1.0, "infonce": 0.1}


@pytest.mark.parametrize(
    ("trained", "settings", "words"),
    [
        ("tower", {}, "nmse pulls .* the vision tower, .* Freeze tower .freeze_vision_tower in a recipe"),
        ("merger", {}, "nmse pulls .* the vision merger, .* Freeze merger .freeze_merger in a recipe"),
        (
            "tower merger",
            {"latent_objective": "cosine:1,infonce:0.1"},
            "cosine and infonce pull .* tower and merger, .* .freeze_vision_tower, freeze_merger in a recipe",
        ),
        ("tower", {"latent_weight": 0.0, "latent_weight_end": 1.0}, "nmse"),
        ("", {}, None),
        ("tower", {"latent_objective": "contrast"}, None),
        ("tower", {"latent_objective": "nmse:0,contrast:1"}, None),
        ("tower", {"latent_weight": 0.0}, None),
    ],
)
def test_targets_that_move_are_named_with_the_cure(load_tiny, tmp_path, trained, settings, words) -> None:
    model, _ = load_tiny("qwen2_5_vl")
    family = family_of(model)
    freeze_vision(family, model, tower="tower" not in trained, merger="merger" not in trained)
    config = LatentSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    told = moving_targets(config, family.vision_parameters(model))
    assert told is None if words is None else re.search(words, told or "")
