"""Measure signals: one teacher-forced forward pass of recorded rollouts, a column of numbers for every signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import ReplayBatch, evaluating, forward_hidden
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import family_of
from rl_lvr.ops.vocab_stats import VocabStats, head_weights, vocab_stats
from rl_lvr.signals import confidence
from rl_lvr.signals.forward import Column, Forward, Space
from rl_lvr.signals.probe import Probe
from rl_lvr.signals.regions import IMAGE_LABEL, Regions, find_regions
from rl_lvr.signals.specs import SignalSpec


@dataclass(frozen=True)
class Measured:
    """What one forward pass says about a batch of B rollouts."""

    hidden: Tensor
    """[B, T, H] after the final norm, without gradient: log-probs come from the same forward."""
    columns: dict[str, Column]
    """By the signal's column name; values and counts have one entry per rollout."""
    kernels: tuple[str, ...]
    """Which attention kernels gave the softmax's denominator, or "recomputed"; () if no signal reads attention."""


def measure(
    model: nn.Module,
    batch: ReplayBatch,
    markers: FormatIds,
    signals: Sequence[SignalSpec],
    *,
    feed: bool = True,
    recompute: bool = False,
    backend: str = "auto",
    run: Callable[[], Tensor] | None = None,
) -> Measured:
    """Measure `signals` on `batch` in one forward pass, in evaluation mode, without gradients.

    `feed=False` leaves SLOT's own embeddings where the latents belong: the negative control. `recompute` is the
    probe's, `backend` that of the fused operations. `run` does the pass itself, feeds the latents, and returns
    the hidden states after the final norm: for a caller that needs more of the same pass.
    """
    _check(signals, markers)
    family = family_of(model)
    image_token = int(family.config.image_token_id)
    regions = find_regions(batch.ids, batch.mask, batch.completion, markers, image_token)
    readings = list(dict.fromkeys(reading for spec in signals if (reading := spec.reading)))
    rows = _attention_rows(regions, signals)
    kept = regions.spans.latent | (regions.labels == IMAGE_LABEL)
    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        inputs: list[Tensor] = []
        if any(spec.value("space") == "input" for spec in signals):
            stack.enter_context(_inputs_at(family.text_layers(model)[0], kept, inputs))
        probe = None
        if readings:
            probe = stack.enter_context(Probe(model, regions, rows, readings, recompute=recompute, backend=backend))
        hidden = forward_hidden(model, batch, markers, feed=feed) if run is None else run()
    vocabulary_rows, vocabulary = _vocabulary(model, hidden, regions, markers, backend)

    def vectors(space: Space, mask: Tensor) -> Tensor:
        return inputs[0][mask[kept].to(inputs[0].device)] if space == "input" else hidden[mask.to(hidden.device)]

    forward = Forward(
        regions=regions,
        attention_rows=rows.flatten().nonzero()[:, 0],
        attention={reading: probe[reading] for reading in readings} if probe else {},
        vocabulary_rows=vocabulary_rows,
        vocabulary=vocabulary,
        vectors=vectors,
    )
    with torch.no_grad():
        columns = {spec.name: spec.function(forward, **spec.parameters) for spec in signals}
    return Measured(hidden, columns, tuple(sorted(probe.kernels)) if probe else ())


def _check(signals: Sequence[SignalSpec], markers: FormatIds) -> None:
    for spec in signals:
        if spec.function is confidence.end_at_first_slot and markers.end is None:
            raise UserError(
                f"signal {spec.name!r} needs a latent format with an end token, which {markers.format.name!r} lacks: "
                "leave it out."
            )


def _attention_rows(regions: Regions, signals: Sequence[SignalSpec]) -> Tensor:
    """[B, T] bool, the queries of all attention signals."""
    rows = torch.zeros_like(regions.completion)
    for spec in signals:
        if spec.reading is not None:
            rows |= regions.queries(spec.queries)
        if spec.needs == "image_entropy":
            rows |= regions.queries("latent")
    return rows


@contextmanager
def _inputs_at(layer: nn.Module, kept: Tensor, inputs: list[Tensor]) -> Iterator[None]:
    """Appends what enters `layer` at `kept` [B, T]: token embeddings, image features and latents, [N, H]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0][kept.to(args[0].device)])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _vocabulary(
    model: nn.Module, hidden: Tensor, regions: Regions, markers: FormatIds, backend: str
) -> tuple[Tensor, Callable[[int], VocabStats]]:
    """Rows of latents and of the positions before a span's first one, and their statistics by top_k."""
    spans = regions.spans
    rows = (spans.latent | confidence.first_latents(spans.latent, spans.index, before=True)).flatten().nonzero()[:, 0]

    @cache
    def statistics(top_k: int) -> VocabStats:
        states = hidden.flatten(0, 1)[rows.to(hidden.device)]
        chosen = None if markers.end is None else states.new_full((len(states),), markers.end, dtype=torch.long)
        with head_weights(family_of(model).head(model)) as head:
            return vocab_stats(
                states, head.weight, bias=head.bias, lora=head.lora, chosen=chosen, top_k=top_k, backend=backend
            )

    return rows, statistics
