"""Where each row of a batch stands between START and END: what is forced, what is chosen, what is counted.

Tensors [B] only, no model and no vectors in here. Rows enter and leave spans independently of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.spans import SpanStatus, find_spans
from rl_lvr.rollout.types import Request

NOT_FORCED = -1


@dataclass
class SpanState:
    """The open span of every row. `fed` counts latents, so under `before_start` it is 1 right after START."""

    inside: Tensor
    """Bool, the row's last token is START or SLOT of an open span."""
    fed: Tensor
    """Latents of the open span so far."""
    total: Tensor
    """Latents of the whole completion so far: which supplied vector is next."""
    k: Tensor
    """Latents after which END is forced; 0 for an empty pair."""
    plain: Tensor
    """Bool, the row's block is written as filler tokens, always to its full length."""

    @classmethod
    def of(cls, requests: Sequence[Request], markers: FormatIds, device: torch.device) -> SpanState:
        """The state in which the prompts leave their rows."""
        open_spans = [open_span(request.prompt_ids, markers) for request in requests]
        return cls(
            inside=torch.tensor([fed is not None for fed in open_spans], device=device),
            fed=torch.tensor([fed or 0 for fed in open_spans], device=device),
            total=torch.zeros(len(requests), dtype=torch.long, device=device),
            k=torch.tensor([latents_per_span(request, markers) for request in requests], device=device),
            plain=torch.tensor([r.intervention is Intervention.PLAIN_TOKENS for r in requests], device=device),
        )

    def forced(self, markers: FormatIds) -> Tensor:
        """The token that each row must write next, `NOT_FORCED` where it is drawn. [B]"""
        assert markers.end is not None
        full = self.fed >= self.k
        token = torch.where(self.inside & full, markers.end, NOT_FORCED)
        going_on = self.inside & ~full
        if markers.format.length == "free":
            going_on = going_on & self.plain
        return torch.where(going_on, markers.slot, token)

    def advance(self, token: Tensor, markers: FormatIds) -> Tensor:
        """Take over the tokens just written (START, SLOT, END also where a filler stands for them).

        Returns the rows in which that token's position is one of the span's latents. [B] bool
        """
        assert markers.start is not None
        opened = token.eq(markers.start)
        slot = token.eq(markers.slot)
        counted = slot | opened if markers.format.first == "before_start" else slot
        self.fed = torch.where(opened, 0, self.fed) + counted
        self.total = self.total + counted
        self.inside = opened | slot
        return counted

    def select(self, rows: Tensor) -> SpanState:
        """The state of some rows."""
        return SpanState(*(getattr(self, field.name)[rows] for field in fields(self)))


def latents_per_span(request: Request, markers: FormatIds) -> int:
    """Latents of one span (cap in `free` length) of this request."""
    if request.intervention is Intervention.SKIP:
        return 0
    return markers.format.k if request.k is None else request.k


def open_span(prompt_ids: Sequence[int], markers: FormatIds) -> int | None:
    """Latents in the span that a prompt leaves open, 0 for none yet; None if it leaves none open."""
    if markers.start is None or markers.format.feedback == "none":
        return None
    spans = find_spans(prompt_ids, markers).spans
    if not spans or spans[-1].status is not SpanStatus.TRUNCATED:
        return None
    return len(spans[-1].latent_positions(markers.format.first))
