"""Signals as functions of the latents that are fed: their gradients against finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import FORMATS, Rig
from signal_cases import by_hand
from torch import Tensor

from rl_lvr.latents.format import get_format
from rl_lvr.signals import measure, parse_signals, signal_tensors

EXACT = ("latent_norm", "latent_image_cosine", "latent_span_cosine")
"""Of what is fed, without the model in between."""
THROUGH = (
    "latent_entropy",
    "latent_confidence",
    "confidence_progression",
    "confidence_reward",
    "end_at_first_slot",
    {"latent_image_cosine": {"space": "hidden", "reduce": "mean", "name": "hidden_cosine"}},
    {"latent_span_cosine": {"space": "hidden", "name": "hidden_span"}},
)
"""Of states that the model makes of it, whose norms are computed in float32."""
ENTRIES = (*EXACT, *THROUGH, "attention_mass", "latent_top_k_mass")


class Setting:
    """A float64 model and a batch whose latents may be replaced."""

    def __init__(self, load_tiny: Any) -> None:
        self.rig = Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))
        self.rig.model = self.rig.model.double().requires_grad_(False)
        self.markers = self.rig.engine(get_format("lvr", k=3)).markers
        word = self.rig.tokenizer.convert_tokens_to_ids("red")
        span = [self.markers.start, *[self.markers.slot] * 3, self.markers.end]
        self.rollouts, self.images = by_hand(self.rig, self.markers, [[*span, word], [word, *span, word, word]])
        self.signals = parse_signals(ENTRIES)

    def batch(self, change: Tensor | None = None) -> Any:
        from rl_lvr.rollout.replay import replay_batch

        found = replay_batch(self.rig.model, self.rollouts, self.images)
        values = found.latents.values.double()
        values = values if change is None else values + change
        return replace(found, latents=replace(found.latents, values=values))

    def tensors(self, batch: Any) -> dict[str, Tensor]:
        found = signal_tensors(self.rig.model, batch, self.markers, self.signals).values
        return {name: values.values for name, values in found.items()}


@pytest.fixture(scope="module")
def setting(load_tiny) -> Setting:
    return Setting(load_tiny)


@pytest.fixture(scope="module")
def gradients(setting: Setting) -> dict[str, Tensor]:
    """[B, N, H] of the first rollout's value of every signal that has one."""
    batch = setting.batch()
    latents = batch.latents.values.requires_grad_()
    found = setting.tensors(batch)
    return {
        name: torch.autograd.grad(values[0], latents, retain_graph=True)[0]
        for name, values in found.items()
        if values.requires_grad
    }


def test_gradients_are_finite_differences(setting: Setting, gradients: dict[str, Tensor]) -> None:
    names = {spec.name for spec in setting.signals} - {"attention_mass", "latent_top_k_mass"}
    assert gradients.keys() == names
    shape = setting.batch().latents.values.shape
    for seed in range(2):
        direction = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        step = 1e-3 * direction
        with torch.no_grad():
            high, low = (setting.tensors(setting.batch(sign * step)) for sign in (1, -1))
        for name in names:
            slope = float(high[name][0] - low[name][0]) / 2e-3
            found = float((gradients[name] * direction).sum())
            size = float(gradients[name].norm())
            assert size > 1e-4, name
            close = 1e-5 if name in EXACT else 1e-3
            assert abs(slope - found) < close * size, (name, slope, found)


def test_another_signals_gradient_is_refuted(setting: Setting, gradients: dict[str, Tensor]) -> None:
    """The control of the test above: its bound tells the gradients of signals apart."""
    direction = torch.randn(gradients["latent_norm"].shape, dtype=torch.float64, generator=torch.Generator())
    found = {name: float((g * direction).sum() / g.norm()) for name, g in gradients.items()}
    for name in ("latent_entropy", "latent_confidence", "end_at_first_slot", "hidden_cosine"):
        assert abs(found[name] - found["latent_norm"]) > 2e-2, name


def test_rollouts_do_not_mix(gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        assert float(gradient[0].abs().max()) > 0, name
        assert float(gradient[1].abs().max()) == 0, name


def test_measuring_makes_no_graph_and_says_the_same(setting: Setting) -> None:
    batch = setting.batch()
    batch.latents.values.requires_grad_()
    tensors = signal_tensors(setting.rig.model, batch, setting.markers, setting.signals)
    measured = measure(setting.rig.model, batch, setting.markers, setting.signals)
    assert tensors.hidden.requires_grad
    assert not measured.hidden.requires_grad
    for name, column in measured.columns.items():
        assert column.values == pytest.approx(tensors.values[name].values.tolist(), abs=1e-12), name
        assert column.counts == tensors.values[name].counts.tolist()
    for name in ("attention_mass", "latent_top_k_mass"):
        assert not tensors.values[name].values.requires_grad


def test_an_ascent_on_a_signal_raises_it(setting: Setting) -> None:
    """What test-time optimisation does: a few steps on the latents, along the gradient of a signal."""
    change = torch.zeros_like(setting.batch().latents.values, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.02)
    means = []
    for _ in range(4):
        value = setting.tensors(setting.batch(change))["latent_confidence"].mean()
        means.append(float(value.detach()))
        optimizer.zero_grad()
        (-value).backward()
        optimizer.step()
    assert means == sorted(means)
    assert means[-1] > means[0] + 1e-3
