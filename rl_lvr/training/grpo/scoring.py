"""One scoring pass: latents fed, markers kept out of the softmax, means of latents and signals collected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.forward.batch import ReplayBatch, states_before
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import family_of
from rl_lvr.rollout.sampling import end_or_not
from rl_lvr.signals import Column, SignalSpec, measure
from rl_lvr.training.grpo.inputs import without_empty_images
from rl_lvr.training.grpo.policies import LatentPolicy, PassInputs
from rl_lvr.wrapping import sharded, unwrapped

_OUT = -1e4
"""Added to a logit, it makes the probability exactly 0 in every precision and leaves the entropy finite."""


@dataclass(frozen=True)
class _Head:
    """What TRL's fused head reads of the output embeddings."""

    weight: Any
    bias: Tensor


class FedModel:
    """Stands in for the model in `_get_per_token_logps_and_entropies`, which calls it once per chunk of rows.

    The log-probs are those of the distribution that engines draw from, at TRL's temperature:

    - Ids that no engine draws (`markers.never_sampled`) are out of the softmax. TRL's fused head asks the model for its
      output embeddings on every call; in here it is told of a bias of -1e4 for them, which counts in its entropy too.
    - SLOT and END have no log-prob of their own: they are forced, and 0. In `free` length they are one decision, END
      against anything else; its log-prob and entropy come from the full logits of those few positions.

    Under a batch without latents nothing else differs from TRL's pass.
    """

    def __init__(
        self,
        model: nn.Module,
        latents: LatentBatch,
        start: int,
        markers: FormatIds,
        temperature: float,
        policy: LatentPolicy | None = None,
        signals: Sequence[SignalSpec] = (),
        images_per_row: Sequence[int] | None = None,
        *,
        draws_start: bool = True,
    ) -> None:
        """`latents` of all rows, positions in the padded ids, whose completions begin at `start`.

        A policy or reference pass is made as `policy` says. A scoring pass has none, and finds the means of latents.
        `draws_start`: whether the engine may draw START; otherwise it is out of the softmax too.
        """
        self._draws_start = draws_start and markers.format.feedback != "none"
        self._images_per_row = images_per_row
        self._model, self._markers, self._temperature = model, markers, temperature
        self._latents, self._start = latents, start
        self._recompute = policy.latents if policy is not None and policy.recomputes else None
        self._wants_means = policy is None or policy.has_loss
        self._signals = signals
        self._family = family_of(model)
        self._next = 0
        self._means: list[Tensor] = []
        self._tie: Tensor | None = None
        self.unroll_difference = 0.0
        """The largest |recomputed - recorded| element of a latent, where there is `recompute`."""
        self.columns: dict[str, Column] = {}
        """The signals, by name."""

    @property
    def means(self) -> Tensor:
        """f(h) of the position before each latent of a completion, [B, N, H]; 0 elsewhere."""
        rows, columns = own_latents(self._latents, self._start).nonzero(as_tuple=True)
        flat = torch.cat(self._means)
        return flat.new_zeros(self._latents.values.shape).index_put((rows, columns), flat)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **inputs: Any) -> Any:
        rows = range(self._next, self._next + len(input_ids))
        self._next = rows.stop
        latents = self._latents.select(list(rows))
        if self._images_per_row:
            inputs = without_empty_images(self._family, inputs, self._images_per_row, rows)
        images = {key: inputs[key] for key in self._family.image_keys if key in inputs}
        if self._images_per_row:
            images = self._family.complete_images(images, [self._images_per_row[row] for row in rows])
            inputs |= images
        # Explicit positions, as the engines': transformers would guess 1-D ones for M-RoPE batches without an image.
        inputs["position_ids"] = self._family.positions(self._model, input_ids, attention_mask, images).prefill
        if self._recompute is not None:
            given = PassInputs(self._model, input_ids, attention_mask, images, self._start, self._markers)
            fed = self._recompute(latents, given)
            if fed.values.numel():
                difference = float((fed.values.detach() - latents.values).abs().max())
                self.unroll_difference = max(self.unroll_difference, difference)
            if sharded(self._model):
                # A process whose rows hold no latent has to take part in the backward passes of the others'.
                self._tie = 0.0 * fed.values.sum()
            latents = fed
        output: Any = None

        def run() -> Tensor:
            nonlocal output
            with self._means_before(latents) as made, inject(self._model, latents, self._markers):
                with self._head(input_ids, labels) as finish:
                    output = self._model(
                        input_ids=input_ids, attention_mask=attention_mask, labels=self._scored(labels), **inputs
                    )
                finish(output)
            hidden, means = made[0]
            self._means.append(means)
            return hidden.detach()

        if self._signals:
            completion = torch.zeros_like(attention_mask, dtype=torch.bool)
            completion[:, self._start :] = attention_mask[:, self._start :].bool()
            batch = ReplayBatch(input_ids, attention_mask, completion, latents, images)
            self._take(measure(self._model, batch, self._markers, self._signals, run=run).columns)
        else:
            run()
        return output

    def _scored(self, labels: Tensor) -> Tensor:
        return labels.masked_fill(self._written(labels), -100)

    def _written(self, labels: Tensor) -> Tensor:
        """[B, T] bool, SLOT and END."""
        written = labels == self._markers.slot
        return written if self._markers.end is None else written | (labels == self._markers.end)

    def _means_before(self, latents: LatentBatch) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
        """Collects states, and f(h) before the latents of completions; before none if nobody wants that."""
        own = own_latents(latents, self._start) & self._wants_means
        return states_before(self._model, own.nonzero(as_tuple=True)[0], latents.positions[own])

    @contextmanager
    def _head(self, ids: Tensor, labels: Tensor) -> Iterator[Any]:
        """Between the model's core and its head: what is decided there; the head that is asked for has the ban."""
        markers, head, base = self._markers, self._family.head(self._model), unwrapped(self._model)
        pairs: list[Tensor] = []
        decided = self._written(labels).nonzero(as_tuple=True)
        free = markers.format.length == "free" and markers.end is not None

        def between(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            if self._tie is not None:
                hidden = output.last_hidden_state = hidden + self._tie
            if free:  # also where nothing was decided: under ZeRO-3 all processes use the head alike
                raw = head(hidden[decided[0], decided[1] - 1]).float()
                pairs.append((end_or_not(raw, int(markers.end or 0)) / self._temperature).log_softmax(-1))
            return output

        def finish(output: Any) -> None:
            if not free:
                return
            ended = torch.isin(ids[decided], torch.tensor([markers.end], device=ids.device))
            value = torch.where(ended, pairs[0][:, 0], pairs[0][:, 1])
            entropy = -(pairs[0].exp() * pairs[0]).sum(-1)
            where = (decided[0], decided[1] - 1)
            output.log_probs = output.log_probs.index_put(where, value.to(output.log_probs.dtype))
            if output.entropy is not None:
                output.entropy = output.entropy.index_put(where, entropy.to(output.entropy.dtype))

        handle = self._family.core(self._model).register_forward_hook(between)
        base.get_output_embeddings = lambda: _Head(head.weight, self._banning_bias(head))
        try:
            yield finish
        finally:
            handle.remove()
            del base.get_output_embeddings  # of this object; its class has one

    def _banning_bias(self, head: Any) -> Tensor:
        """The head's own bias, and `_OUT` for what is never drawn."""
        width = self._family.config.get_text_config().vocab_size
        ban: Any = torch.zeros(width, device=head.weight.device, dtype=head.weight.dtype)
        ban[list(self._markers.never_sampled)] = _OUT
        if self._markers.start is not None and not self._draws_start:
            ban[self._markers.start] = _OUT
        if head.bias is not None:
            ban = ban + head.bias
        if hasattr(head.weight, "ds_status"):
            ban.ds_status = type(head.weight.ds_status).AVAILABLE  # TRL asks every tensor of the head under ZeRO-3
        found: Tensor = ban
        return found

    def _take(self, columns: dict[str, Column]) -> None:
        for name, column in columns.items():
            known = self.columns.get(name)
            self.columns[name] = (
                column
                if known is None
                else replace(column, values=[*known.values, *column.values], counts=[*known.counts, *column.counts])
            )


def own_latents(latents: LatentBatch, start: int) -> Tensor:
    """[B, N] bool, latents of the completions, which begin at `start`: the model's own."""
    return latents.mask & (latents.positions >= start)
