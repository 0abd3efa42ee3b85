"""Latents recomputed with gradients, and the states before latents, on rollouts of the real engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import FORMATS, SAMPLED, SIX_ROWS, Rig
from torch import Tensor

from rl_lvr.forward.batch import ReplayBatch, forward_hidden
from rl_lvr.forward.unrolling import unrolled
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.training.grpo.scoring import own_latents

KINDS = {
    "fixed": get_format("lvr", k=3),
    "free": get_format("monet", k=4),
    "before_start": get_format("monet", k=3, length="fixed"),
}


def case(load_tiny: Any, latent_format: LatentFormat, family: str = "qwen2_5_vl", **spec: Any) -> tuple[Any, Any]:
    """Rows with none, one and several spans, with no, one and two images; padded as TRL pads them."""
    rig = Rig(*load_tiny(family, latent_formats=FORMATS, **spec))
    attach_feedback(rig.model, latent_format)
    engine = rig.engine(latent_format)
    with rig.thinking(latent_format, start=5.0):
        requests = rig.requests(SIX_ROWS)
        rollouts = engine.generate(requests, replace(SAMPLED, max_tokens=16))
    return Padded(rig, engine.markers, rollouts, [request.images for request in requests]), rollouts


class Padded:
    """Prompts padded on the left, completions on the right."""

    def __init__(self, rig: Rig, markers: Any, rollouts: list[Any], images: list[Any]) -> None:
        self.model, self.markers = rig.model, markers
        self.start = max(len(r.prompt_ids) for r in rollouts)
        width = self.start + max(len(r.completion_ids) for r in rollouts)
        self.ids = torch.zeros(len(rollouts), width, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        offsets = []
        for row, rollout in enumerate(rollouts):
            offsets.append(self.start - len(rollout.prompt_ids))
            where = slice(offsets[-1], offsets[-1] + len(rollout.ids))
            self.ids[row, where] = torch.tensor(rollout.ids)
            self.mask[row, where] = 1
        joined = replay_batch(rig.model, rollouts, images)
        self.images = joined.images
        self.latents = joined.latents.shifted(torch.tensor(offsets))
        self.completion = self.mask.bool() & (torch.arange(width) >= self.start)

    def unrolled(self, clip: float | None = None) -> LatentBatch:
        return unrolled(self.model, self.ids, self.mask, self.images, self.latents, self.start, self.markers, clip)

    def hidden(self, latents: LatentBatch) -> Tensor:
        return forward_hidden(
            self.model, ReplayBatch(self.ids, self.mask, self.completion, latents, self.images), self.markers
        )

    def naive(self) -> LatentBatch:
        """One full forward per latent: the textbook, at K + 1 times the cost."""
        own = own_latents(self.latents, self.start)
        values = torch.where(own[..., None], torch.zeros_like(self.latents.values), self.latents.values)
        for column in range(values.shape[1]):
            latents = replace(self.latents, values=values)
            rows = own[:, column].nonzero()[:, 0]
            places = self.latents.positions[rows, column]
            made = self.model_feedback(self.hidden(latents)[rows, places - 1])
            values = values.index_put((rows, torch.full_like(rows, column)), made)
        return replace(self.latents, values=values)

    def model_feedback(self, hidden: Tensor) -> Tensor:
        module = getattr(self.model, "latent_proj", None)
        return hidden if module is None else module(hidden)

    def loss(self, latents: LatentBatch) -> Tensor:
        """A weighted sum of the log-probs of the completions' text."""
        hidden = self.hidden(latents)
        logits = self.model.get_output_embeddings()(hidden)[:, self.start - 1 : -1]
        logp = logits.log_softmax(-1).gather(-1, self.ids[:, self.start :, None])[..., 0]
        weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(0), dtype=logp.dtype)
        return (logp * weights * self.completion[:, self.start :]).sum()

    def gradients(self, latents: LatentBatch) -> dict[str, Tensor]:
        self.model.zero_grad()
        self.loss(latents).backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_full_forward_per_latent(load_tiny: Any, kind: str) -> None:
    padded, rollouts = case(load_tiny, KINDS[kind])
    counts = padded.latents.counts.tolist()
    assert min(counts) < max(counts)
    assert max(sum(t == padded.markers.start for t in r.completion_ids) for r in rollouts) > 1
    made, naive = padded.unrolled(), padded.naive()
    assert made.values.requires_grad
    assert torch.allclose(made.values, padded.latents.values, atol=1e-3)  # what the engine fed; rounding grows along k
    assert torch.allclose(made.values, naive.values, atol=1e-3)
    found, wanted = padded.gradients(made), padded.gradients(naive)
    fixed = padded.gradients(padded.latents)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert torch.allclose(found[name], gradient, rtol=1e-2, atol=1e-3 * size + 1e-6), name
    layer = next(name for name in wanted if "layers.0.mlp.down_proj" in name)
    assert not torch.allclose(fixed[layer], wanted[layer], rtol=0.1)  # the control: latents as fixed inputs


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "llava_onevision"])
def test_other_families(load_tiny: Any, family: str) -> None:
    padded, _ = case(load_tiny, KINDS["fixed"], family)
    assert padded.latents.counts.sum() > 0
    made = padded.unrolled().values
    assert torch.allclose(made, padded.latents.values, atol=1e-3)
    assert not torch.allclose(made[:, 0], padded.latents.values[:, 0].roll(1, 0), atol=1e-2)


def test_through_a_projector(load_tiny: Any) -> None:
    padded, _ = case(load_tiny, get_format("lvr", k=2, projector="mlp", norm="embedding"))
    made = padded.unrolled()
    assert torch.allclose(made.values, padded.latents.values, atol=1e-3)
    gradients = padded.gradients(made)
    assert float(gradients["latent_proj.down.weight"].abs().max()) > 0
    assert "latent_proj.down.weight" not in padded.gradients(padded.latents)


def test_the_gradient_by_finite_differences(load_tiny: Any) -> None:
    """Of the loss as a function of the parameters, latents and all."""
    padded, _ = case(load_tiny, KINDS["fixed"], init_std=0.1)
    padded.model.double()
    padded.latents = padded.latents.to(torch.float64)
    padded.images = {k: v.double() if v.is_floating_point() else v for k, v in padded.images.items()}
    gradients = padded.gradients(padded.unrolled())
    fixed = padded.gradients(padded.latents)
    name = next(n for n in gradients if n.endswith("layers.0.mlp.down_proj.weight") and "language" in n)
    weight = dict(padded.model.named_parameters())[name]
    generator = torch.Generator().manual_seed(1)
    direction = (
        gradients[name] / gradients[name].norm()
        + torch.randn(weight.shape, generator=generator, dtype=torch.float64) / weight.numel() ** 0.5
    )
    step = 1e-4  # not smaller: Qwen's RMSNorm rounds to float32 in a float64 model too
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            weight += sign * step * direction
            if sign:
                values.append(float(padded.loss(padded.naive())))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((gradients[name] * direction).sum()), rel=5e-3)
    assert slope != pytest.approx(float((fixed[name] * direction).sum()), rel=5e-2)  # the control


def test_clipped_gradients(load_tiny: Any) -> None:
    """A row that pulls a million times harder pulls no more than the median one; a bound that none reaches is exact."""
    padded, _ = case(load_tiny, KINDS["fixed"])
    counts = padded.latents.counts
    short = int(torch.where(counts > 0, counts, 99).argmin())  # others have latents beside each of its own

    untouched = padded.unrolled().values.detach()

    def through_latents(pull: float, clip: float | None) -> Tensor:
        made = padded.unrolled(clip).values
        assert torch.equal(made, untouched)
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        weights[short] *= pull
        padded.model.zero_grad()
        (made * weights).sum().backward()
        found = [p.grad for n, p in padded.model.named_parameters() if "layers.0.mlp.down_proj" in n]
        return next(gradient for gradient in found if gradient is not None).clone()

    exact, bounded = through_latents(1.0, None), through_latents(1.0, 1.0)
    assert torch.equal(through_latents(1.0, 1e6), exact)
    assert not torch.allclose(bounded, exact, rtol=1e-2)  # it does something
    hard, harder = through_latents(1e4, 1.0), through_latents(1e6, 1.0)
    assert (hard - harder).norm() < 1e-2 * hard.norm()
    assert harder.norm() < 2 * bounded.norm()
    assert through_latents(1e6, None).norm() > 1e4 * exact.norm()  # the control


def test_rows_without_latents_are_left_alone(load_tiny: Any) -> None:
    padded, _ = case(load_tiny, KINDS["fixed"])
    none = LatentBatch.empty(len(padded.ids), padded.latents.hidden_size)
    assert unrolled(padded.model, padded.ids, padded.mask, padded.images, none, padded.start, padded.markers) is none
