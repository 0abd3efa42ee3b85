"""Token ids -> latent spans and masks. What a malformed span means is defined here, once.

Rules for a format with markers, read from left to right:

- START opens a span. SLOT tokens right after it belong to it. END right after those closes it: `CLOSED`.
- Any other token, a second START among them, ends an open span before that token: `BROKEN`. A nested START
  opens a new span of its own.
- The sequence ends inside a span: `TRUNCATED`.
- SLOT or END outside a span is `stray`; a trainer refuses a record that holds one.

A format without markers has one `CLOSED` span per run of SLOT tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from rl_lvr.latents.format import FormatIds


class SpanStatus(Enum):
    """How a span ended."""

    CLOSED = "closed"
    """END stands right after the last slot."""
    BROKEN = "broken"
    """Another token, or a nested START, stands where a slot or END should be."""
    TRUNCATED = "truncated"
    """The sequence ends inside the span."""


@dataclass(frozen=True)
class Span:
    """One span of one row. Positions are absolute in that row; -1 marks a token that is not there."""

    start: int
    first_slot: int
    slots: int
    end: int
    status: SpanStatus

    @property
    def begin(self) -> int:
        """First position of the span."""
        return self.start if self.start >= 0 else self.first_slot

    @property
    def stop(self) -> int:
        """Position after the last token of the span."""
        return (self.end if self.end >= 0 else self.first_slot + self.slots - 1) + 1

    def latent_positions(self, first: str) -> range:
        """Positions that hold latents. Under `before_start` START's own embedding is the first one."""
        begin = self.start if first == "before_start" and self.start >= 0 else self.first_slot
        return range(begin, self.first_slot + self.slots)


@dataclass(frozen=True)
class RowSpans:
    """All spans of one row, and the marker tokens that belong to none."""

    spans: tuple[Span, ...]
    stray: tuple[int, ...]


def find_spans(ids: Sequence[int] | np.ndarray, markers: FormatIds) -> RowSpans:
    """Spans of one row of token ids, by the rules at the top. The cost grows with the markers, not the text."""
    row = np.asarray(ids)
    if markers.start is None:
        return RowSpans(tuple(_runs(row, markers.slot)), ())
    spans: list[Span] = []
    stray: list[int] = []
    start = -1  # START of the open span
    slots = 0

    def close(status: SpanStatus, end: int = -1) -> None:
        nonlocal start, slots
        spans.append(Span(start, start + 1, slots, end, status))
        start, slots = -1, 0

    kinds = (row == markers.start) | (row == markers.slot) | (row == markers.end)
    for position in np.flatnonzero(kinds).tolist():
        if start >= 0 and position != start + slots + 1:
            close(SpanStatus.BROKEN)  # ordinary text came in between
        token = row[position]
        if token == markers.start:
            if start >= 0:
                close(SpanStatus.BROKEN)
            start = position
        elif start < 0:
            stray.append(position)
        elif token == markers.slot:
            slots += 1
        else:
            close(SpanStatus.CLOSED, position)
    if start >= 0:
        close(SpanStatus.TRUNCATED if start + slots + 1 == len(row) else SpanStatus.BROKEN)
    return RowSpans(tuple(spans), tuple(stray))


def _runs(row: np.ndarray, slot: int) -> list[Span]:
    is_slot = np.concatenate([[False], row == slot, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_slot)).reshape(-1, 2)
    return [Span(-1, int(a), int(b - a), -1, SpanStatus.CLOSED) for a, b in edges]


@dataclass(frozen=True)
class SpanMasks:
    """Masks over a padded batch, all of shape [B, T]. Padding is False (-1 in `index`) in every one."""

    start: Tensor
    slot: Tensor
    end: Tensor
    latent: Tensor
    """Positions that hold a latent: the slots, and START too under `before_start`."""
    forced: Tensor
    """Tokens that the engine wrote without a choice: no loss, no KL, no ratio there."""
    after: Tensor
    """Text after the row's last span; nothing in a row without spans."""
    index: Tensor
    """Which span of the row a position belongs to, -1 outside."""

    @property
    def inside(self) -> Tensor:
        """Every position of every span, markers included."""
        return self.index >= 0


def span_masks(ids: Tensor, markers: FormatIds, attention_mask: Tensor | None = None) -> SpanMasks:
    """Masks of a batch `ids` [B, T]. Padded positions (`attention_mask` 0) are cut off before the search.

    Padding stands at the ends of a row. A gap inside it is refused: a span across one has no meaning.
    """
    rows = ids.detach().cpu().numpy()
    shape = rows.shape
    valid = np.ones(shape, bool) if attention_mask is None else attention_mask.detach().cpu().numpy().astype(bool)
    start, slot, end, latent, forced, after = (np.zeros(shape, bool) for _ in range(6))
    index = np.full(shape, -1, np.int64)
    for b in range(shape[0]):
        kept = np.flatnonzero(valid[b])
        if not len(kept):
            continue
        offset, stop = int(kept[0]), int(kept[-1]) + 1
        if stop - offset != len(kept):
            raise ValueError(f"row {b}: the attention mask has a gap between positions {offset} and {stop - 1}.")
        spans = find_spans(rows[b, offset:stop], markers).spans
        for i, span in enumerate(spans):
            begin, close = span.first_slot + offset, span.first_slot + span.slots + offset
            slot[b, begin:close] = True
            index[b, span.begin + offset : span.stop + offset] = i
            if span.start >= 0:
                start[b, span.start + offset] = True
            if span.end >= 0:
                end[b, span.end + offset] = True
            where = span.latent_positions(markers.format.first)
            latent[b, where.start + offset : where.stop + offset] = True
            if markers.format.length == "fixed" or markers.start is None:
                forced[b, begin:close] = True
                forced[b, close : span.stop + offset] = True
            elif span.end >= 0 and span.slots >= markers.format.slots:
                forced[b, span.end + offset] = True  # the cap left no choice
        if spans:
            after[b, spans[-1].stop + offset : stop] = True
    masks = (torch.from_numpy(m).to(ids.device) for m in (start, slot, end, latent, forced, after, index))
    return SpanMasks(*masks)
