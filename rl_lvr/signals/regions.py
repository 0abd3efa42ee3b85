"""Which tokens a signal looks at: regions of keys, sets of queries, and the sequence that a token belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import SpanMasks, span_masks

Region = Literal["latent", "slot", "image", "markers", "sink"]
Queries = Literal["after", "text", "completion", "latent"]

REGIONS: dict[str, tuple[int, ...]] = {"slot": (0,), "latent": (0, 1), "image": (2,), "markers": (3, 1), "sink": (4,)}
"""Labels that make up a region. Label 1 is a START whose embedding a latent replaces: it is both."""
LABELS = 5
IMAGE_LABEL = 2


@dataclass(frozen=True)
class Regions:
    """What every token of a padded or packed batch is. All tensors are [B, T] on one device."""

    labels: Tensor
    """int64, the key region of a token (`REGIONS`), -1 for ordinary text and padding."""
    sequences: Tensor
    """int64, the sequence that a token belongs to, counted over the whole batch; -1 for padding."""
    completion: Tensor
    """bool, tokens of a completion."""
    spans: SpanMasks
    count: int
    """Sequences in the batch: its rows, unless rows are packed."""

    def queries(self, which: Queries) -> Tensor:
        """[B, T] bool.

        `after`: the completion's text after the sequence's last span (nothing if it has no span, or a truncated last
        one). `text`: all of the completion outside spans. `completion`: all of it. `latent`: positions of latents.
        """
        if which == "latent":
            return self.spans.latent
        if which == "after":
            return self.completion & self.spans.after
        return self.completion & ~self.spans.inside if which == "text" else self.completion


def find_regions(
    ids: Tensor,
    mask: Tensor,
    completion: Tensor,
    markers: FormatIds,
    image_token: int,
    segments: Tensor | None = None,
) -> Regions:
    """Regions of `ids` [B, T]; `mask` [B, T] is 0 at padding, `completion` [B, T] marks the completions' tokens.

    `segments` [B, T] numbers the sequences packed into a row, -1 at padding; None: a row is one sequence. The sink is
    the first token of a sequence, if it is ordinary text.
    """
    valid = mask.bool()
    if segments is None:
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        sequences = torch.where(valid, rows, -1)
        count, spans = len(ids), span_masks(ids, markers, mask)
    else:
        sequences, count = _numbered(torch.where(valid, segments.long(), -1))
        spans = _packed_spans(ids, sequences, count, markers)
    labels = torch.full_like(ids, -1)
    first = valid & (sequences != torch.nn.functional.pad(sequences, (1, 0), value=-1)[:, :-1])
    labels[first] = REGIONS["sink"][0]
    labels[valid & (ids == image_token)] = IMAGE_LABEL
    labels[spans.start | spans.end] = 3
    labels[spans.slot] = 0
    labels[spans.start & spans.latent] = 1
    return Regions(labels, sequences, completion & valid, spans, count)


def _numbered(segments: Tensor) -> tuple[Tensor, int]:
    """Numbers that are distinct within a row -> numbers from 0 that are distinct in the batch, and how many."""
    width = int(segments.max()) + 2
    keys = segments + torch.arange(len(segments), device=segments.device)[:, None] * width
    present, numbers = torch.where(segments >= 0, keys, -1).unique(return_inverse=True)
    padding = int(bool((segments < 0).any()))
    return numbers - padding, len(present) - padding


def _packed_spans(ids: Tensor, sequences: Tensor, count: int, markers: FormatIds) -> SpanMasks:
    """Spans of each packed sequence on its own, written back to where it stands in its row."""
    flat = sequences.flatten()
    places = [(flat == sequence).nonzero()[:, 0] for sequence in range(count)]
    pieces = torch.nn.utils.rnn.pad_sequence([ids.flatten()[place] for place in places], batch_first=True)
    lengths = torch.tensor([len(place) for place in places], device=ids.device)
    real = torch.arange(pieces.shape[1], device=ids.device) < lengths[:, None]
    found = span_masks(pieces, markers, real)
    where = torch.cat(places)

    def back(values: Tensor, empty: int) -> Tensor:
        whole = torch.full_like(flat, empty).to(values.dtype)
        whole[where] = values[real]
        return whole.view_as(ids)

    names = ("start", "slot", "end", "latent", "forced", "after")
    return SpanMasks(**{name: back(getattr(found, name), 0) for name in names}, index=back(found.index, -1))
