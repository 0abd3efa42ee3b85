"""The reference engine: batched generation with latents on a plain Hugging Face model.

Here are requests, checks, batches and the model's mode; the loop over tokens is in `decode.py`. Docs: docs/engines.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import batch_images, evaluating
from rl_lvr.latents.feedback import NAME
from rl_lvr.latents.format import LatentFormat
from rl_lvr.models import family_of
from rl_lvr.progress import track
from rl_lvr.rollout.binding import bound
from rl_lvr.rollout.checks import check_request, starts_with_own
from rl_lvr.rollout.decode import BatchDecoder
from rl_lvr.rollout.parts import Parts
from rl_lvr.rollout.stops import StopStrings
from rl_lvr.rollout.types import Capability, Request, Rollout, Sampling, request_seeds, with_start
from rl_lvr.wrapping import unwrapped


class HFRolloutEngine:
    """Generates with a model in this process: the engine that every other one is checked against.

    `model` may be wrapped (PEFT, DDP, DeepSpeed) and is shared, not copied: a trainer's update is seen at once. It
    keeps its training mode. End-of-sequence ids are those of the generation config and the tokenizer together.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        format: LatentFormat,  # noqa: A002
        *,
        batch_size: int = 16,
        progress: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
        base: Any = unwrapped(model)
        if (format.projector != "none" or format.norm != "none") and not hasattr(base, NAME):
            raise UserError(
                f"latent format {format.name!r} maps hidden states (projector {format.projector!r}, norm "
                f"{format.norm!r}) but the model has no such module: call attach_feedback(model, format, folder) first."
            )
        self.model = model
        self.format = format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size = batch_size
        self.progress = progress
        self.capabilities = frozenset(Capability)

        family = family_of(model)
        generation = getattr(base, "generation_config", None)
        found = bound(format, family, self.tokenizer, None if generation is None else generation.eos_token_id)
        self.markers, self._limits = found.markers, found.limits
        pad = self.tokenizer.pad_token_id
        self._parts = Parts(
            model=model,
            family=family,
            core=family.core(model),
            head=family.head(model),
            markers=self.markers,
            eos=found.eos,
            pad=found.eos[0] if pad is None else pad,
            max_positions=found.limits.max_positions,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in their order. Rows do not influence each other."""
        requests = with_start(requests, sampling)
        for index, request in enumerate(requests):
            check_request(index, request, self.markers, self._limits)
        seeds = request_seeds(requests, sampling)
        rollouts: dict[int, Rollout] = {}
        batches = self._batches(requests)
        with evaluating(self.model), torch.no_grad():
            for batch in track(batches, "generate", unit="batch", visible=self.progress):
                stops = StopStrings(self.tokenizer, sampling.stop, len(batch))
                decoder = BatchDecoder(
                    self._parts, [requests[i] for i in batch], [seeds[i] for i in batch], sampling, stops
                )
                try:
                    hidden = decoder.prefill()
                except torch.OutOfMemoryError:
                    raise
                except (ValueError, RuntimeError):
                    self._explain_images(batch, requests)
                    raise
                rollouts.update(zip(batch, decoder.run(hidden), strict=True))
        return [rollouts[i] for i in range(len(requests))]

    def _explain_images(self, batch: Sequence[int], requests: Sequence[Request]) -> None:
        """Say which request of a batch that failed has the wrong number of image tokens. Transformers knows only
        the batch's sum, and each family counts in its own way: so count the vectors, now that it is too late anyway."""
        family = self._parts.family
        for index in batch:
            images = batch_images(family, self.model, [requests[index].images])
            wanted = sum(len(features) for features in family.image_features(self.model, images)) if images else 0
            given = list(requests[index].prompt_ids).count(self._limits.image_token)
            if given != wanted:
                raise UserError(
                    f"request {index}: the prompt has {given} image tokens, its images take {wanted}: "
                    "build prompt and images in one call of the processor."
                )

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Longest prompts first, similar lengths together; prompts that open with a latent of their own apart."""
        batches = []
        for opens in (False, True):
            kept = [i for i, r in enumerate(requests) if starts_with_own(r, self.markers) is opens]
            kept.sort(key=lambda i: -len(requests[i].prompt_ids))
            batches += [kept[i : i + self.batch_size] for i in range(0, len(kept), self.batch_size)]
        return batches

    def sync_weights(self, model: nn.Module) -> None:
        """Nothing to do for the model that the engine already shares; another one's weights are copied by name."""
        mine, theirs = unwrapped(self.model), unwrapped(model)
        if mine is not theirs:
            mine.load_state_dict(theirs.state_dict())

    def close(self) -> None:
        """Nothing is held beyond the shared model."""
