"""Signals of text-only models: those of images have no values, and all others are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import SAMPLED
from vllm_cases import TEXT, VLLMRig, thinking

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.signals import SIGNALS, image_map, measure, parse_signals

FORMAT = get_format("lvr", k=3)


@pytest.fixture(scope="module", params=TEXT)
def rig(request, tiny_folder, tmp_path_factory) -> VLLMRig:
    folder: Path = thinking(tiny_folder, tmp_path_factory.mktemp("text"), request.param)
    return VLLMRig(folder)


def test_all_signals_are_measured(rig):
    engine = rig.engine(FORMAT)
    assert rig.family.image_token == -1
    rollouts = engine.generate(rig.requests(), replace(SAMPLED, seed=1, max_tokens=64))
    assert max(len(rollout.latent_positions) for rollout in rollouts) >= 3
    batch = replay_batch(rig.model, rollouts, [{} for _ in rollouts])
    measured = measure(rig.model, batch, engine.markers, parse_signals(list(SIGNALS))).columns
    of_images = {"attention_relative", "image_attention_entropy_difference", "latent_image_cosine"}
    for name, column in measured.items():
        assert (sum(column.counts) == 0) == (name in of_images), name
        assert (max(map(abs, column.values)) == 0) == (name in of_images), name
    unfed = measure(rig.model, batch, engine.markers, parse_signals(list(SIGNALS)), feed=False).columns
    assert unfed["attention_mass"].values != measured["attention_mass"].values
    for found in image_map(rig.model, batch, engine.markers, queries="latent"):
        assert found.weights.shape == (len(found.queries), 0)
        assert found.grids == ()


def test_the_entropy_is_that_of_the_logits(rig):
    engine = rig.engine(FORMAT)
    rollouts = engine.generate(rig.requests()[:2], replace(SAMPLED, seed=1, max_tokens=64))
    batch = replay_batch(rig.model, rollouts, [{}, {}])
    measured = measure(rig.model, batch, engine.markers, parse_signals(["latent_entropy"]))
    with torch.no_grad():
        log_p = rig.family.head(rig.model)(measured.hidden).double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for row, rollout in enumerate(rollouts):
        places = list(rollout.latent_positions)
        truth = float(entropy[row, places].mean()) if places else 0.0
        assert measured.columns["latent_entropy"].values[row] == pytest.approx(truth, abs=1e-4)
