"""What the tests of signals share: rollouts that are written by hand, and one rollout alone on eager attention."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from engine_cases import SIX_ROWS, Rig
from helpers import paper_b_masks
from torch import Tensor

from rl_lvr.forward.inject import inject
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.rollout.types import Rollout, StopReason


def by_hand(
    rig: Rig, markers: FormatIds, completions: list[list[int]], rows: Any = SIX_ROWS
) -> tuple[list[Rollout], list[dict[str, Any]]]:
    """Rollouts with these completions behind prompts of `rows`, with random vectors in the slots."""
    rollouts, images = [], []
    requests = rig.requests(rows)[: len(completions)]
    for number, (request, tokens) in enumerate(zip(requests, completions, strict=True)):
        first = len(request.prompt_ids)
        places = [first + i for i, token in enumerate(tokens) if token == markers.slot]
        vectors = torch.randn(len(places), rig.family.hidden_size, generator=torch.Generator().manual_seed(number))
        rollouts.append(
            Rollout(
                prompt_ids=tuple(request.prompt_ids),
                completion_ids=tuple(tokens),
                logprobs=torch.zeros(len(tokens)),
                forced=torch.zeros(len(tokens), dtype=torch.bool),
                latents=vectors,
                latent_positions=tuple(places),
                stop_reason=StopReason.LENGTH,
                seed=number,
                sigma=0.0,
                intervention=Intervention.OWN,
            )
        )
        images.append(request.images)
    return rollouts, images


@dataclass
class Plain:
    """One rollout alone: eager weights [L, H, T, T], logits [T, V], inputs and hidden states [T, D], and positions."""

    weights: Tensor
    logits: Tensor
    inputs: Tensor
    hidden: Tensor
    spans: list[list[int]]
    slots: list[int]
    image: list[int]
    markers: list[int]
    after: list[int]
    completion: list[int]
    paper_b_masks: tuple[list[int], list[int]]

    @property
    def latents(self) -> list[int]:
        return [position for span in self.spans for position in span]

    def mass(self, query: int, keys: list[int], layers: Any = slice(None)) -> float:
        return float(self.weights[layers, :, query][..., keys].sum(-1).mean()) if keys else 0.0

    def mean_mass(self, keys: list[int], layers: Any = slice(None)) -> float:
        return mean([self.mass(query, keys, layers) for query in self.after])

    def paper_b(self, keys: list[int]) -> float:
        return mean([self.mass(query, keys, slice(0, 1)) for query in self.paper_b_masks[0]])

    def log_p(self, position: int) -> Tensor:
        return self.logits[position].double().log_softmax(-1)

    def entropy(self, position: int) -> float:
        log_p = self.log_p(position)
        return float(-(log_p.exp() * log_p).sum())

    def sharpness(self, position: int, k: int) -> float:
        return float(-self.log_p(position).topk(k).values.mean())

    def image_entropy(self, position: int) -> float:
        p = self.weights[:, :, position][..., self.image].double()
        p = p / p.sum(-1, keepdim=True)
        return float(-(p * p.log()).sum(-1).mean())

    def pairs(self) -> list[tuple[int, int]]:
        return [pair for span in self.spans for pair in itertools.pairwise(span)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def plain_forward(rig: Rig, rollout: Rollout, images: dict[str, Any], markers: FormatIds) -> Plain:
    """Without padding, without our masks, without the probe."""
    batch = replay_batch(rig.model, [rollout], [images])
    seen: list[Tensor] = []
    layer = rig.family.text_layers(rig.model)[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].clone()))
    rig.model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), inject(rig.model, batch.latents, markers):
            out = rig.model(
                input_ids=batch.ids,
                position_ids=rig.family.positions(rig.model, batch.ids, batch.mask, batch.images).prefill,
                output_attentions=True,
                output_hidden_states=True,
                use_cache=False,
                **batch.images,
            )
    finally:
        handle.remove()
        rig.model.set_attn_implementation("sdpa")
    ids, prompt = list(rollout.ids), len(rollout.prompt_ids)
    latents, spans, last = list(rollout.latent_positions), [], None
    for position in latents:
        if spans and position == spans[-1][-1] + 1:
            spans[-1].append(position)
        else:
            spans.append([position])
    if markers.start in ids:
        last = max(i for i, token in enumerate(ids) if token in (markers.start, markers.slot, markers.end))
    return Plain(
        weights=torch.stack([weights[0] for weights in out.attentions]),
        logits=out.logits[0],
        inputs=seen[0],
        hidden=out.hidden_states[-1][0],
        spans=spans,
        slots=[i for i, token in enumerate(ids) if token == markers.slot],
        image=[i for i, token in enumerate(ids) if token == rig.family.image_token],
        markers=[i for i, token in enumerate(ids) if token in (markers.start, markers.end)],
        after=[] if last is None else list(range(max(last + 1, prompt), len(ids))),
        completion=list(range(prompt, len(ids))),
        paper_b_masks=paper_b_masks(ids, prompt, len(latents) or None, markers.start, markers.end),
    )
