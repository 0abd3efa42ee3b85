"""What the reference engine's loop works with: the model taken apart, and what is known about each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import Family
from rl_lvr.rollout.checks import opens_span
from rl_lvr.rollout.types import Request, Sampling, start_of
from rl_lvr.wrapping import input_embeddings


@dataclass(frozen=True)
class Parts:
    """A model taken apart for decoding."""

    model: nn.Module
    family: Family
    core: nn.Module
    head: nn.Module
    markers: FormatIds
    eos: tuple[int, ...]
    pad: int
    max_positions: int

    @property
    def thinks(self) -> bool:
        """Whether the format generates latents at all."""
        return self.markers.start is not None and self.markers.format.feedback == "hidden"

    @property
    def embedding(self) -> Any:
        return input_embeddings(self.model)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        return self.family.hidden_size

    @property
    def vocabulary(self) -> int:
        """Read from the config: under ZeRO-3 the weight is empty on this rank."""
        return int(self.family.config.get_text_config().vocab_size)


@dataclass
class Rows:
    """What the loop knows about each row that still runs; each [B]."""

    index: Tensor
    """Row of the batch as it began."""
    seeds: Tensor
    prompt: Tensor
    """Tokens in the prompt, padding excluded: the absolute position of the first new token."""
    limit: Tensor
    """Tokens that the row may write."""
    opens: Tensor
    """Bool, the first token is START whatever is drawn."""
    no_start: Tensor
    """Bool, START cannot be drawn."""
    bias: Tensor
    """Added to START's logit."""
    filler: Tensor
    done: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], seeds: Sequence[int], sampling: Sampling, parts: Parts) -> Rows:
        """The rows before the first token."""

        def column(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, device=parts.device)

        starts = [start_of(request, sampling) for request in requests]
        lengths = [len(request.prompt_ids) for request in requests]
        return cls(
            index=torch.arange(len(requests), device=parts.device),
            seeds=column(list(seeds)),
            prompt=column(lengths),
            limit=column([min(sampling.max_tokens, parts.max_positions - n) for n in lengths]),
            opens=column(
                [
                    parts.thinks and opens_span(request, start, parts.markers)
                    for request, start in zip(requests, starts, strict=True)
                ]
            ),
            no_start=column(
                [
                    not parts.thinks or start.forbidden or request.intervention is Intervention.NONE
                    for request, start in zip(requests, starts, strict=True)
                ]
            ),
            bias=column([start.bias for start in starts]),
            filler=column([parts.pad if r.filler_id is None else r.filler_id for r in requests]),
            done=torch.zeros(len(requests), dtype=torch.bool, device=parts.device),
        )

    def select(self, rows: Tensor) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))
