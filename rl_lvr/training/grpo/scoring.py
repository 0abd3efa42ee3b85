"""One scoring pass: latents fed, markers kept out of the softmax, means of latents and signals collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.forward.batch import ReplayBatch
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import family_of
from rl_lvr.rollout.sampling import end_or_not
from rl_lvr.signals import Column, SignalSpec, measure
from rl_lvr.training.grpo.inputs import without_empty_images
from rl_lvr.training.grpo.policies import PassInputs
from rl_lvr.wrapping import sharded, unwrapped

_OUT = -1e4
"""Added to a logit, it makes the probability exactly 0 in every precision and leaves the entropy finite."""


class FedModel:
    """Stands in for the model in `_get_per_token_logps_and_entropies`, which calls it once per chunk of rows.

    The log-probs are those of the distribution that engines draw from, at TRL's temperature:

    - Ids that no engine draws (`markers.never_sampled`) are out of the softmax. TRL's fused head reads `head.bias` on
      every call, so a bias of -1e4 there takes them out, in its entropy too.
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
        *,
        recompute: Callable[[LatentBatch, PassInputs], LatentBatch] | None = None,
        means: bool = True,
        signals: Sequence[SignalSpec] = (),
        images_per_row: Sequence[int] | None = None,
    ) -> None:
        """`latents` of all rows, positions in the padded ids, whose completions begin at `start`.

        `recompute` returns what is fed instead of them (`LatentPolicy.latents`).
        """
        self._images_per_row = images_per_row
        self._model, self._markers, self._temperature = model, markers, temperature
        self._latents, self._start = latents, start
        self._recompute, self._wants_means, self._signals = recompute, means, signals
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
        if "batch_num_images" in self._family.image_keys and self._images_per_row and "pixel_values" in inputs:
            # LLaVA-OneVision treats rows of several images differently; TRL drops what tells them apart.
            counts = [self._images_per_row[row] for row in rows if self._images_per_row[row]]
            inputs["batch_num_images"] = torch.tensor(counts, device=input_ids.device)
        images = {key: inputs[key] for key in self._family.image_keys if key in inputs}
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
        seen: list[Tensor] = []
        output: Any = None

        def run() -> Tensor:
            nonlocal output
            with inject(self._model, latents, self._markers), self._head(input_ids, labels, latents, seen) as finish:
                output = self._model(
                    input_ids=input_ids, attention_mask=attention_mask, labels=self._scored(labels), **inputs
                )
                finish(output)
            return seen[0]

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

    @contextmanager
    def _head(self, ids: Tensor, labels: Tensor, latents: LatentBatch, seen: list[Tensor]) -> Iterator[Any]:
        """Between the model's core and its head: states are collected there, and the ban is put on the head."""
        markers, head = self._markers, self._family.head(self._model)
        pairs: list[Tensor] = []
        decided = self._written(labels).nonzero(as_tuple=True)
        free = markers.format.length == "free" and markers.end is not None
        own = own_latents(latents, self._start)
        rows = own.nonzero(as_tuple=True)[0]
        places = latents.positions[own]

        def between(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            seen.append(hidden.detach())
            if self._wants_means:
                mean = feedback(self._model, hidden[rows, places - 1])
                self._means.append(mean)
                if hasattr(unwrapped(self._model), FEEDBACK):
                    # Ties the map to the forward: DDP sees its parameters used, ZeRO-3 gathers them in order.
                    hidden = output.last_hidden_state = hidden + 0.0 * mean.sum()
            if self._tie is not None:
                hidden = output.last_hidden_state = hidden + self._tie
            if free:  # also where nothing was decided: under ZeRO-3 all processes use the head alike
                raw = head(hidden[decided[0], decided[1] - 1]).float()
                pairs.append((end_or_not(raw, int(markers.end or 0)) / self._temperature).log_softmax(-1))
            head.__dict__["bias"] = self._ban(head)
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
        try:
            yield finish
        finally:
            handle.remove()
            head.__dict__.pop("bias", None)  # what the module itself holds is seen again

    def _ban(self, head: Any) -> Tensor:
        """The head's bias with the ban on it. Laid over the attribute: the module's parameters stay as they are."""
        width = self._family.config.get_text_config().vocab_size
        ban: Any = torch.zeros(width, device=head.weight.device, dtype=head.weight.dtype)
        ban[list(self._markers.never_sampled)] = _OUT
        if self._markers.start is not None and self._markers.format.feedback == "none":
            ban[self._markers.start] = _OUT  # engines generate no block then, so they do not draw START either
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
