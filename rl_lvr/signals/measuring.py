"""Measure signals: one teacher-forced forward pass of recorded rollouts, a column of numbers for every signal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError, exits_refused
from rl_lvr.forward.batch import ReplayBatch, evaluating, forward_hidden
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import family_of
from rl_lvr.ops.vocab_stats import VocabStats, head_weights, vocab_stats
from rl_lvr.signals.confidence import first_latents
from rl_lvr.signals.forward import Forward, Space
from rl_lvr.signals.probe import Probe
from rl_lvr.signals.regions import Regions, find_regions
from rl_lvr.signals.specs import SignalSpec
from rl_lvr.signals.values import Column, Values, not_finite, problem_of


@dataclass(frozen=True)
class Measured:
    """What one forward pass says about a batch of B rollouts."""

    hidden: Tensor
    """[B, T, H] after the final norm, without gradient: log-probs come from the same forward."""
    columns: dict[str, Column]
    """By the signal's column name; values and counts have one entry per rollout."""
    kernels: tuple[str, ...]
    """Which attention kernels gave the softmax's denominator, or "recomputed"; () if no signal reads attention."""


@dataclass(frozen=True)
class SignalTensors:
    """The same as tensors, with gradients unless the caller turned them off."""

    hidden: Tensor
    values: dict[str, Values]
    kernels: tuple[str, ...]


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

    Args:
        model: The model, wrapped or not.
        batch: Recorded rollouts.
        markers: The latent format in the model's vocabulary.
        signals: What `parse_signals` returned.
        feed: False leaves SLOT's own embeddings where the latents belong: the negative control.
        recompute: The probe computes the softmax's denominator anew.
        backend: Of the fused operations.
        run: Does the pass itself, feeds the latents, and returns the hidden states after the final norm: for a caller
            that needs more of the same pass.

    Raises:
        UserError: If a signal cannot be measured in this format, returns what is not `Values` of the batch, or is not
            finite although the hidden states are.
    """
    with torch.no_grad():
        found = signal_tensors(model, batch, markers, signals, feed=feed, recompute=recompute, backend=backend, run=run)
        return Measured(found.hidden, {name: v.column() for name, v in found.values.items()}, found.kernels)


def signal_tensors(
    model: nn.Module,
    batch: ReplayBatch,
    markers: FormatIds,
    signals: Sequence[SignalSpec],
    *,
    feed: bool = True,
    recompute: bool = False,
    backend: str = "auto",
    run: Callable[[], Tensor] | None = None,
) -> SignalTensors:
    """Evaluate `signals` on `batch` as tensors; arguments and errors are those of `measure`.

    Gradients flow from the values to what `batch.latents.values` and the weights require. Signals of attention carry
    none: the probe reads attention outside of autograd. The output head gets none either.
    """
    _check(signals, markers)
    family = family_of(model)
    regions = find_regions(batch.ids, batch.mask, batch.completion, markers, family.image_token)
    needs = [spec.needs for spec in signals]
    readings = list(dict.fromkeys(reading for need in needs for reading in need.readings))
    queries = tuple(dict.fromkeys(which for need in needs for which in need.queries))
    rows = torch.zeros_like(regions.completion)
    for which in queries:
        rows |= regions.queries(which)
    kept = regions.spans.latent | regions.image
    with evaluating(model), ExitStack() as stack:
        inputs: list[Tensor] = []
        if any(need.inputs for need in needs):
            stack.enter_context(_inputs_at(family.text_layers(model)[0], kept, inputs))
        probe = None
        if readings:
            probe = stack.enter_context(Probe(model, regions, rows, readings, recompute=recompute, backend=backend))
        hidden = forward_hidden(model, batch, markers, feed=feed) if run is None else run()
    vocabulary_rows, vocabulary = _vocabulary(model, hidden, regions, markers, backend)

    def vectors(space: Space, mask: Tensor) -> Tensor:
        if space == "hidden":
            return hidden[mask.to(hidden.device)]
        if bool((mask & ~kept).any()):
            raise UserError("what enters the first layer is kept at latents and image tokens alone: read hidden.")
        return inputs[0][mask[kept].to(inputs[0].device)]

    forward = Forward(
        regions=regions,
        attention_rows=rows.flatten().nonzero()[:, 0],
        attention={reading: probe[reading] for reading in readings} if probe else {},
        vocabulary_rows=vocabulary_rows,
        vocabulary=vocabulary,
        vectors=vectors,
        queries=queries,
    )
    values = {spec.name: _evaluated(spec, forward, hidden) for spec in signals}
    return SignalTensors(hidden, values, tuple(sorted(probe.kernels)) if probe else ())


def _check(signals: Sequence[SignalSpec], markers: FormatIds) -> None:
    for spec in signals:
        if spec.needs.end and markers.end is None:
            raise UserError(
                f"signal {spec.name!r} needs a latent format with an end token, which {markers.format.name!r} lacks: "
                "leave it out."
            )


def _evaluated(spec: SignalSpec, forward: Forward, hidden: Tensor) -> Values:
    """What a definition says of the pass. It may be of others, so what it returns is looked at."""
    what = f"signal {spec.name!r}"
    try:
        with exits_refused(what):
            found = spec.function(forward.limited(spec.needs, what), **spec.parameters)
    except Exception as error:
        error.add_note(f"in the {what} ({spec.where})")
        raise
    problem = problem_of(found, forward.count)
    if problem is not None:
        raise UserError(f"{what} ({spec.where}) {problem}.")
    wrong = not_finite(found)
    # A model that is not finite is the run's own fault, which it finds in its loss and its weights.
    if wrong is not None and bool(hidden.isfinite().all()):
        raise UserError(
            f"{what} ({spec.where}) is {wrong[1]} for rollout {wrong[0]} of the batch: where there is nothing to "
            "average its value must be 0 and its count 0."
        )
    return found


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
    rows = (spans.latent | first_latents(spans.latent, spans.index, before=True)).flatten().nonzero()[:, 0]

    @cache
    def statistics(top_k: int) -> VocabStats:
        states = hidden.flatten(0, 1)[rows.to(hidden.device)]
        chosen = None if markers.end is None else states.new_full((len(states),), markers.end, dtype=torch.long)
        with head_weights(family_of(model).head(model)) as head:
            return vocab_stats(
                states, head.weight, bias=head.bias, lora=head.lora, chosen=chosen, top_k=top_k, backend=backend
            )

    return rows, statistics
