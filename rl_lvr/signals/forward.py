"""What signals are computed from: one teacher-forced forward pass, reduced to the rows that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rl_lvr.ops.vocab_stats import VocabStats
from rl_lvr.signals.probe import Reading
from rl_lvr.signals.regions import Queries, Regions

Space = Literal["input", "hidden"]


@dataclass(frozen=True)
class Column:
    """A signal's values: one number per sequence, or one list per sequence."""

    values: list[float] | list[list[float]]
    counts: list[int]
    """How many terms each sequence's value rests on. Where it is 0, the value is 0.0 (or an empty list)."""


@dataclass(frozen=True)
class Forward:
    """One forward pass of a batch. `rows` [N] are flat indices b*T + t, in increasing order, of the rows kept."""

    regions: Regions
    attention_rows: Tensor
    """[A] flat indices of the queries that the probe measured."""
    attention: Mapping[Reading, Tensor]
    """fp32 [A, LABELS] or [A]."""
    vocabulary_rows: Tensor
    """[V] flat indices of the rows whose next-token distribution is measured."""
    vocabulary: Callable[[int], VocabStats]
    """top_k -> statistics of `vocabulary_rows`, where the chosen token is END (if the format has one)."""
    vectors: Callable[[Space, Tensor], Tensor]
    """(space, mask [B, T] bool) -> vectors [N, H] at these positions: what entered the first layer, or the hidden
    states after the final norm."""

    @property
    def count(self) -> int:
        return self.regions.count

    # ---- which rows

    def sequence_of(self, rows: Tensor) -> Tensor:
        """[N] flat indices -> [N] sequence numbers."""
        return self.regions.sequences.flatten()[rows.to(self.regions.sequences.device)]

    def attended(self, reading: Reading, queries: Queries) -> tuple[Tensor, Tensor]:
        """Rows [N] of a query set, and what the probe read there."""
        values = self.attention[reading]
        kept = self.regions.queries(queries).flatten()[self.attention_rows]
        return self.attention_rows[kept], values[kept.to(values.device)]

    def at_latents(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [L] of the latents, and `values` [V, ...] of `vocabulary_rows` there."""
        kept = self.regions.spans.latent.flatten()[self.vocabulary_rows]
        return self.vocabulary_rows[kept], values[kept.to(values.device)]

    def neighbours(self, rows: Tensor) -> Tensor:
        """[N - 1] bool for increasing flat rows of latents: whether i and i + 1 follow each other in one span."""
        span = self.regions.spans.index.flatten()[rows]
        sequence = self.sequence_of(rows)
        return (span[1:] == span[:-1]) & (sequence[1:] == sequence[:-1])

    # ---- reductions over sequences

    def mean(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of `values` [N] or [N, R] over each sequence's rows: ([S] or [S, R], counts [S]); 0 without a row."""
        sequence = self.sequence_of(rows).to(values.device)
        total = values.new_zeros(self.count, *values.shape[1:]).index_add(0, sequence, values)
        counts = torch.bincount(sequence, minlength=self.count)
        return total / counts.clamp_min(1).view(-1, *[1] * (values.dim() - 1)), counts

    def per_sequence(self, values: Tensor, rows: Tensor) -> Column:
        """One mean per sequence."""
        means, counts = self.mean(values, rows)
        return Column(means.tolist(), counts.tolist())

    def per_row(self, values: Tensor, rows: Tensor) -> Column:
        """The values of each sequence in a list."""
        counts = torch.bincount(self.sequence_of(rows), minlength=self.count)
        return Column([part.tolist() for part in _split(values, self.sequence_of(rows), counts)], counts.tolist())

    def per_token(self, values: Tensor, rows: Tensor) -> Column:
        """One value per token of the completion, 0.0 where `rows` has none."""
        grid = values.new_zeros(self.regions.labels.numel())
        grid[rows.to(values.device)] = values
        tokens = self.regions.completion.flatten().nonzero()[:, 0]
        lists = self.per_row(grid[tokens.to(grid.device)], tokens).values
        return Column(lists, torch.bincount(self.sequence_of(rows), minlength=self.count).tolist())


def _split(values: Tensor, sequence: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    order = torch.argsort(sequence, stable=True)
    return values[order.to(values.device)].split(counts.tolist())
