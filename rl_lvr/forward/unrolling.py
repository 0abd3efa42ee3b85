"""Latents recomputed with gradients: f(h) again and again through a key-value cache, as the engine made them.

A latent at position p is f(h) of position p - 1, so a run of k latents takes k short forwards, and the text between
two runs one longer one. Runs of all rows start together: each text is padded on the left, so that the state before the
first latent stands in its last column; padded columns are masked as keys and have positions of their own.

Under ZeRO-3 a forward needs all processes. Each then takes as many as that with the most latents, some of them on
padding alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.agreement import largest
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import family_of
from rl_lvr.wrapping import input_embeddings, sharded

SMALLEST = 1e-30


@dataclass(frozen=True)
class _Run:
    """Latents of one row that follow each other without a token between them."""

    column: int
    """Of its first latent in the carrier."""
    place: int
    length: int

    @property
    def stop(self) -> int:
        return self.place + self.length


def unrolled(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    images: dict[str, Tensor],
    latents: LatentBatch,
    start: int,
    markers: FormatIds,
    clip: float | None = None,
) -> LatentBatch:
    """`latents` with every vector at position `start` or later replaced by f(h), a function of the parameters.

    `ids` and `mask` [B, T] are the padded batch in which positions count, `images` its image inputs. Latents before
    `start` belong to the prompts and stay as they are. `clip` shortens gradients on their way back (`_shortened`).
    """
    runs = [_runs(latents.positions[row].tolist(), start) for row in range(len(latents))]
    longest = [max(run.length for run in current if run) for current in zip_longest(*runs)]
    if sharded(model):
        (count,) = largest(len(longest))
        longest = largest(*longest, *[0] * (count - len(longest)))
    if not longest:
        return latents
    reader = _Reader(model, ids, mask, images)
    begin = mask.long().argmax(1).tolist()
    rows, columns, vectors = [], [], []
    for number, steps in enumerate(longest):
        current = [found[number] if number < len(found) else None for found in runs]
        # A row without any run still brings its images, which enter with the prompts.
        stops = [run.place if run else (start if number == 0 else b) for run, b in zip(current, begin, strict=True)]
        state = reader.text(begin, stops, latents if number == 0 else None, markers)
        for step in range(steps):
            active = [row for row, run in enumerate(current) if run and step < run.length]
            made = feedback(model, state).to(reader.dtype)
            if clip is not None and made.requires_grad:
                made.register_hook(partial(_shortened, clip))
            rows += active
            columns += [run.column + step for run in current if run and step < run.length]
            vectors.append(made[active])
            if number + 1 < len(longest) or step + 1 < steps:
                places = [run.place + step if run and step < run.length else None for run in current]
                state = reader.vectors(made, places)
        begin = [run.stop if run else b for run, b in zip(current, begin, strict=True)]
    where = tuple(torch.tensor(places, dtype=torch.long, device=ids.device) for places in (rows, columns))
    return replace(latents, values=latents.values.to(reader.dtype).index_put(where, torch.cat(vectors)))


def _shortened(times: float, gradient: Tensor) -> Tensor:
    """[B, H]: no row longer than `times` the median of those that are not zero.

    Along the recurrence some rows' gradients grow a hundredfold, step by step; summed up they would be the batch's.
    The direction of each row stays, and at every latent that it passes on its way back it is shortened anew. A row that
    has more latents than all others is its own median at the last of them.
    """
    lengths = gradient.float().norm(dim=-1, keepdim=True)
    felt = lengths[lengths > 0]
    if not len(felt):
        return gradient
    return gradient * (times * felt.median() / lengths.clamp_min(SMALLEST)).clamp_max(1.0).to(gradient.dtype)


def _runs(positions: list[int], start: int) -> list[_Run]:
    """Of one row's positions, -1 behind the last one."""
    own = [(column, place) for column, place in enumerate(positions) if place >= start]
    edges = [0, *(i for i in range(1, len(own)) if own[i][1] != own[i - 1][1] + 1), len(own)]
    return [_Run(*own[a], b - a) for a, b in pairwise(edges) if a < b]


class _Reader:
    """The model's core, fed piece by piece; each piece sees all those before it through the cache."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor, images: dict[str, Tensor]) -> None:
        family = family_of(model)
        self._model, self._ids, self._images = model, ids, images
        self._core = family.core(model)
        self._positions = family.positions(model, ids, mask, images).prefill
        self._seen = mask.new_zeros(len(ids), 0)
        self._cache: Any = None
        weight: Any = input_embeddings(model).weight
        self.dtype = weight.dtype

    def text(self, begin: list[int], stop: list[int], latents: LatentBatch | None, markers: FormatIds) -> Tensor:
        """Read tokens `begin` to `stop` of every row. State after the last one, [B, H]"""
        width = max(1, *(b - a for a, b in zip(begin, stop, strict=True)))
        last = torch.tensor(stop, device=self._ids.device)[:, None]
        places = last - width + torch.arange(width, device=self._ids.device)
        valid = places >= torch.tensor(begin, device=self._ids.device)[:, None]
        places = places.clamp(min=0)
        ids = self._ids.gather(1, places).masked_fill(~valid, markers.slot)  # padding that is no image token
        if latents is None:
            return self._forward(places, valid, input_ids=ids)
        prompt = latents.positions
        prompt = torch.where((prompt >= 0) & (prompt < last), prompt, -1)
        given = LatentBatch(latents.values, prompt, latents.sigma).shifted((width - last)[:, 0].to(prompt.device))
        with inject(self._model, given, markers):
            return self._forward(places, valid, input_ids=ids, **self._images)

    def vectors(self, made: Tensor, places: list[int | None]) -> Tensor:
        """Read one vector [B, H] per row, in the rows that have a place for it. State after it, [B, H]"""
        where = torch.tensor([[0 if place is None else place] for place in places], device=self._ids.device)
        valid = torch.tensor([[place is not None] for place in places], device=self._ids.device)
        return self._forward(where, valid, inputs_embeds=made[:, None])

    def _forward(self, places: Tensor, valid: Tensor, **inputs: Any) -> Tensor:
        positions = self._positions.gather(-1, places.expand(*self._positions.shape[:-1], -1))
        self._seen = torch.cat([self._seen, valid.to(self._seen)], 1)
        output = self._core(
            attention_mask=self._seen,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **inputs,
        )
        self._cache = output.past_key_values
        state: Tensor = output.last_hidden_state[:, -1]
        return state
