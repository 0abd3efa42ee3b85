"""Which tokens a signal looks at: regions of keys, sets of queries, and the sequence that a token belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import SpanMasks, span_masks

Region = Literal["latent", "slot", "image", "markers", "sink", "closed_slot"]
Queries = Literal["after", "text", "completion", "latent", "paper_b"]

REGIONS: dict[str, tuple[int, ...]] = {
    "slot": (0, 5),
    "latent": (0, 1, 5),
    "image": (2,),
    "markers": (3, 1),
    "sink": (4,),
    "closed_slot": (0,),
}
"""Labels that make up a region. Label 1 is a START whose embedding a latent replaces: it is both. Label 5 is a slot of
a span that END does not close, which paper B's code does not look at."""
LABELS = 6
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
    starts: Tensor
    """bool, every START token, also one outside any span; `ends` likewise."""
    ends: Tensor

    @property
    def image(self) -> Tensor:
        """[B, T] bool, image tokens."""
        return (self.labels == IMAGE_LABEL) & (self.sequences >= 0)

    def image_columns(self) -> tuple[Tensor, Tensor]:
        """Return [B, T] int64, the number of an image token among those of its sequence, and [S] int64, how many a
        sequence has. The number is -1 at other tokens.
        """
        places = self.image.flatten().nonzero()[:, 0]
        sequence = self.sequences.flatten()[places]
        counts = torch.bincount(sequence, minlength=self.count)
        order = torch.argsort(sequence, stable=True)
        first = (counts.cumsum(0) - counts)[sequence[order]]
        columns = torch.full_like(self.labels, -1).flatten()
        columns[places[order]] = torch.arange(len(places), device=places.device) - first
        return columns.view_as(self.labels), counts

    def queries(self, which: Queries) -> Tensor:
        """[B, T] bool.

        `after`: the completion's text after the sequence's last span (nothing if it has no span, or a truncated last
        one). `text`: all of the completion outside spans. `completion`: all of it. `latent`: positions of latents.
        `paper_b`: as the code of paper B has it, see `_paper_b_queries`.
        """
        if which == "paper_b":
            return _paper_b_queries(self)
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
    labels[spans.slot] = torch.where(_closed(spans, sequences), 0, 5)[spans.slot]
    labels[spans.start & spans.latent] = 1
    none = torch.zeros_like(valid)
    starts, ends = (none if token is None else valid & (ids == token) for token in (markers.start, markers.end))
    return Regions(labels, sequences, completion & valid, spans, count, starts, ends)


def _closed(spans: SpanMasks, sequences: Tensor) -> Tensor:
    """[B, T] bool, positions in a span that END closes, or whose format has no END."""
    if not bool((spans.start | spans.end).any()):
        return spans.inside
    width = int(spans.index.max()) + 2
    keys = (sequences + 1) * width + spans.index + 1
    return spans.inside & torch.isin(keys, keys[spans.end])


def _paper_b_queries(regions: Regions) -> Tensor:
    """[B, T] bool, the queries of paper B's attention reward (2605.18641) by its code, `dp_actor.py`.

    All tokens behind the last END and behind the first START plus the number of latents fed; where no token is,
    or neither marker, the whole completion.
    """
    found = torch.zeros_like(regions.completion)
    columns = torch.arange(found.shape[1], device=found.device)
    fed = regions.spans.latent & regions.completion
    for number in range(regions.count):
        rows = (regions.sequences == number).nonzero()[:, 0]
        if not len(rows):
            continue
        row = int(rows[0])
        mine = regions.sequences[row] == number
        starts, ends = (columns[mine & marks[row]] for marks in (regions.starts, regions.ends))
        steps = int((fed[row] & mine).sum())
        bounds = ends[-1:].tolist() + ([int(starts[0]) + steps] if len(starts) and steps else [])
        behind = mine & (columns > max(bounds)) if bounds else torch.zeros_like(mine)
        found[row] |= behind if bool(behind.any()) else mine & regions.completion[row]
    return found


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
