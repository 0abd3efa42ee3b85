"""Device tables with one row per slot: a slot is the persistent index that vLLM's runner gives a running request.

All are allocated once and written in place, so that nothing here waits for the host or is captured by a CUDA graph.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.checks import opens_span
from rl_lvr.rollout.feeding import FedRows, fed
from rl_lvr.rollout.spanstate import SpanState, latents_per_span, open_span
from rl_lvr.rollout.types import start_of
from rl_lvr.rollout.vllm.settings import LatentSettings
from rl_lvr.rollout.vllm.wire import LatentArgs

TEXT, START, SLOT, END = range(4)
KIND, FORCED, FED = 3, 4, 8
"""A mark is the kind of a token, in two bits, and whether it was forced, and whether it took a latent."""


class SlotTables:
    """What is known on the device about every running request."""

    def __init__(self, settings: LatentSettings, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        width, room = settings.limits.hidden_size, settings.max_latents
        self._settings, self._dtype = settings, dtype

        def table(kind: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=kind, device=device)

        self.span = SpanState(
            inside=table(torch.bool),
            fed=table(torch.long),
            total=table(torch.long),
            k=table(torch.long),
            plain=table(torch.bool),
        )
        self.opens = table(torch.bool)
        """The next token is START whatever is drawn."""
        self.broken = table(torch.bool)
        """The request cannot go on: it is made to end."""
        self.no_start = table(torch.bool)
        self.start_bias = table(torch.float32)
        self.filler = table(torch.long)
        self.seeds = table(torch.long)
        self.feeds = table(torch.bool)
        self.sigma = table(torch.float32)
        self.matched = table(torch.bool)
        self.unit = table(torch.bool)
        self.zeros = table(torch.bool)
        self.supplied = table(torch.bool)
        self.vector_count = table(torch.long)
        self.temperature = table(torch.float32)
        self.min_p = table(torch.float32)
        self.top_p = table(torch.float32)
        self.top_k = table(torch.long)
        self.feed = table(torch.bool)
        """The token chosen last takes `next_latent` in place of its embedding."""
        self.next_latent = table(dtype, width)
        self.history = table(dtype, room, width)
        self.marks = table(torch.int8, settings.limits.max_positions + 1)
        """By absolute position, of generated tokens only."""
        self.distorted = table(torch.bool)
        self.uncut = table(torch.float32, settings.limits.max_positions + 1, 2)
        """By absolute position, of generated tokens of distorted requests only: log-prob and kept mass of `Uncut`."""
        self.vectors = table(dtype, room, width)
        """Supplied vectors. Made at the start too: later the key-value cache has taken the memory."""

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        members = [*vars(self).values(), *vars(self.span).values()]
        return sum(member.nbytes for member in members if isinstance(member, Tensor))

    def add(self, slot: int, args: LatentArgs, sampling: Any, *, broken: bool) -> None:
        """Start a request in `slot`. `sampling` is vLLM's SamplingParams.

        UserError, and nothing is written, if a number does not fit into its table.
        """
        request, kind, markers = args.request, args.request.intervention, self._settings.markers
        start = start_of(request)
        fed = open_span(request.prompt_ids, markers) if not broken else None
        span = self.span
        values = (
            (span.inside, fed is not None),
            (span.fed, fed or 0),
            (span.total, 0),
            (span.k, latents_per_span(request, markers)),
            (span.plain, kind is Intervention.PLAIN_TOKENS),
            (self.opens, args.opens or opens_span(request, start, markers)),
            (self.broken, broken),
            (self.no_start, start.forbidden or kind is Intervention.NONE),
            (self.start_bias, start.bias),
            (self.filler, request.filler_id or 0),
            (self.seeds, request.seed or 0),
            (self.feeds, kind.feeds_vectors),
            (self.sigma, args.sigma if kind is Intervention.OWN else 0.0),
            (self.matched, kind is Intervention.NOISE),
            (self.unit, kind is Intervention.UNIT_NOISE),
            (self.zeros, kind is Intervention.ZEROS),
            (self.supplied, request.vectors is not None),
            (self.vector_count, 1 if request.vectors is None else len(request.vectors)),
            *((getattr(self, name), getattr(sampling, name)) for name in ("temperature", "min_p", "top_p")),
            (self.top_k, min(sampling.top_k, self._settings.limits.vocabulary)),
            (self.feed, False),
        )
        for table, value in values:
            if not _fits(value, table.dtype):
                raise UserError(f"the request holds the number {value}, which is too large for latents: lower it.")
        for table, value in values:
            table[slot] = value
        self.marks[slot].zero_()
        if request.vectors is not None:
            self.vectors[slot, : len(request.vectors)] = request.vectors.to(self._dtype)

    def resume(self, slot: int, ids: list[int], prompt: int, marks: Tensor, vectors: Tensor) -> Tensor:
        """Put a preempted request back where the tokens `ids` leave it. Returns the positions of its own latents.

        `marks` and `vectors` are what it had when it was taken away; what was cut off since is dropped.
        """
        markers = self._settings.markers
        output = marks[prompt : len(ids)]
        kinds = output & KIND
        drawn = {START: markers.start, SLOT: markers.slot, END: markers.end}
        # A block of `plain_tokens` is written as filler: the marks say what the filler stands for.
        completion = [drawn.get(kind, token) for kind, token in zip(kinds.tolist(), ids[prompt:], strict=True)]
        fed = open_span([token for token in (*ids[:prompt], *completion) if token is not None], markers)
        counted = kinds == SLOT
        if markers.format.first == "before_start":
            counted |= kinds == START
        span = self.span
        span.inside[slot], span.fed[slot], span.total[slot] = fed is not None, fed or 0, int(counted.sum())
        if len(ids) > prompt:  # else it was taken away in its prompt, and START is still to come
            self.opens[slot] = False
        places = prompt + (output & FED).nonzero()[:, 0]
        self.history[slot, : len(places)] = vectors[: len(places)].to(self.history.device)
        self.marks[slot, prompt : len(ids)] = output.to(self.marks.device)
        return places

    def choose(
        self, own: Tensor, slots: Tensor, positions: Tensor, index: Tensor, *, noise: bool, supplied: bool
    ) -> Tensor:
        """What to feed at `positions` [N] as latents number `index` [N] of their completions. [N, H]

        `own` [N, H] is f(h). `noise`, `supplied`: whether there may be rows with noise, or with vectors of their own.
        """
        rows = FedRows(*(getattr(self, entry.name)[slots] for entry in fields(FedRows)))
        given = self.vectors[slots, index.clamp(min=0) % self.vector_count[slots]] if supplied else None
        return fed(own, positions, rows, given, noise=noise).to(self._dtype)


def _fits(value: float, dtype: torch.dtype) -> bool:
    if dtype is torch.bool:
        return True
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min <= value <= limits.max
