"""What the probe's tests share: batches with latents in them, and the masses that eager attention's weights give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import MIXED_ROWS, make_batch
from torch import Tensor

from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.models import family_of
from rl_lvr.signals import Probe, Reading, Regions, find_regions
from rl_lvr.signals.regions import LABELS

LAYERS = 3
SPAN = get_format("lvr", k=3).text()
REPLIES = (f"red {SPAN} green 1 2", f"{SPAN}{get_format('lvr').text(2)} blue", f"yellow {SPAN} 3 what next hops")


@dataclass(frozen=True)
class Case:
    """A model, the inputs of one forward pass, and what their tokens are."""

    model: Any
    inputs: dict[str, Any]
    regions: Regions
    markers: FormatIds

    @property
    def width(self) -> int:
        return self.regions.labels.shape[1]

    @property
    def rows(self) -> Tensor:
        """[B, T] bool, all real tokens."""
        return self.regions.sequences >= 0

    @property
    def wrong(self) -> Case:
        """The control: every region one token further on."""
        return replace(self, regions=replace(self.regions, labels=self.regions.labels.roll(1, 1)))

    def forward(self) -> Tensor:
        return self.model(**self.inputs, use_cache=False).logits

    def probe(self, readings: list[Reading], **how: Any) -> Probe:
        return Probe(self.model, self.regions, self.rows, readings, **how)

    def eager_weights(self) -> Tensor:
        """Attention weights of all layers, [L, H, B * T, T]."""
        self.model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                out = self.model(**self.inputs, use_cache=False, output_attentions=True)
        finally:
            self.model.set_attn_implementation("sdpa")
        return torch.stack([layer.transpose(0, 1).flatten(1, 2) for layer in out.attentions])


def make_case(model: Any, processor: Any, side: str, rows: Any = MIXED_ROWS) -> Case:
    family = family_of(model)
    batch = make_batch(processor, rows, side, REPLIES[: len(rows)])
    device, dtype = model.device, model.dtype
    inputs = {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    markers = get_format("lvr", k=3).bind(processor.tokenizer, family.placeholder_ids(processor))
    image = family.image_token
    mask = inputs["attention_mask"]
    regions = find_regions(inputs["input_ids"], mask, mask.bool(), markers, image)
    return Case(model, inputs, regions, markers)


def packed(case: Case) -> Case:
    """The rows of a right-padded case behind each other in one row."""
    family = family_of(case.model)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    images = family.image_inputs(case.inputs)
    positions = family.positions(case.model, ids, mask, images).prefill
    lengths = mask.sum(1).tolist()
    rows = torch.cat([ids[row, :length] for row, length in enumerate(lengths)])[None]
    text = torch.cat([torch.arange(length) for length in lengths])[None]
    places = torch.cat([positions[..., row, :length] for row, length in enumerate(lengths)], -1)
    if positions.ndim == 3:  # M-RoPE; the text positions in front tell where a sequence begins
        places = torch.cat([text[None], places[:, None]])
    else:
        places = places[None]
    segments = torch.cat([torch.full((length,), row) for row, length in enumerate(lengths)])[None]
    ones = torch.ones_like(rows)
    image = family.image_token
    regions = find_regions(rows, ones, ones.bool(), case.markers, image, segments)
    inputs = {"input_ids": rows, "position_ids": places, **images}
    return replace(case, inputs=inputs, regions=regions)


def eager_masses(case: Case) -> Tensor:
    """[L, H, N, LABELS] at all real tokens, from eager attention's weights."""
    weights = case.eager_weights().float()
    labels = case.regions.labels[:, None].expand(-1, case.width, -1).flatten(0, 1)
    masses = torch.stack([(weights * (labels == label)).sum(-1) for label in range(LABELS)], -1)
    return masses[:, :, case.rows.flatten()]


def measured_masses(case: Case, **how: Any) -> tuple[Tensor, set[str]]:
    """The same from one armed forward, and the kernels that it used."""
    layers, heads = LAYERS, case.model.config.get_text_config().num_attention_heads
    readings = [[Reading("mass", (layer,), (head,)) for head in range(heads)] for layer in range(layers)]
    with case.probe([reading for row in readings for reading in row], **how) as probe, torch.no_grad():
        case.forward()
    return torch.stack([torch.stack([probe[reading] for reading in row]) for row in readings]), probe.kernels
