"""What signals are computed from: one teacher-forced forward pass, reduced to the rows that they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import VocabStats
from rl_lvr.signals.declaring import Needs
from rl_lvr.signals.probe import Reading
from rl_lvr.signals.regions import Queries, Regions
from rl_lvr.signals.values import Values

Space = Literal["input", "hidden"]


@dataclass(frozen=True)
class Forward:
    """One forward pass of a batch: what a definition of a signal is given.

    `rows` [N] are flat indices b*T + t, in increasing order, of the rows kept. Where the pass was made with gradients,
    `vocabulary` and `vectors` carry them; `attention` never does, because the probe reads it outside of autograd.
    """

    regions: Regions
    attention_rows: Tensor
    """[A] flat indices of the queries that the probe measured."""
    attention: Mapping[Reading, Tensor]
    """Of the shapes that `Reading` says, with A for N. No gradient."""
    vocabulary_rows: Tensor
    """[V] flat indices of the rows whose next-token distribution is measured."""
    vocabulary: Callable[[int], VocabStats]
    """top_k -> statistics of `vocabulary_rows`, where the chosen token is END (if the format has one). All carry
    gradients but the top-k mass."""
    vectors: Callable[[Space, Tensor], Tensor]
    """(space, mask [B, T] bool) -> vectors [N, H] at these positions: what entered the first layer (there are those of
    latents and image tokens alone), or the hidden states after the final norm."""
    queries: tuple[Queries, ...] = ()
    """Query sets whose attention was measured."""
    of: str = "a signal"
    """Whose pass this is, for messages."""

    @property
    def count(self) -> int:
        return self.regions.count

    def limited(self, needs: Needs, of: str) -> Forward:
        """The pass with what `needs` declares alone. To read more is an error, also where others declared it."""

        def refuse(*_: object) -> NoReturn:
            raise UserError(f"{of} reads next-token distributions without declaring them: write vocabulary=True.")

        def vectors(space: Space, mask: Tensor) -> Tensor:
            if space == "input" and not needs.inputs:
                raise UserError(f"{of} reads what enters the first layer without declaring it: write inputs=True.")
            return self.vectors(space, mask)

        return replace(
            self,
            attention={reading: self.attention[reading] for reading in needs.readings},
            vocabulary=self.vocabulary if needs.vocabulary else refuse,
            vectors=vectors,
            queries=needs.queries,
            of=of,
        )

    # ---- which rows

    def sequence_of(self, rows: Tensor) -> Tensor:
        """[N] flat indices -> [N] sequence numbers."""
        return self.regions.sequences.flatten()[rows.to(self.regions.sequences.device)]

    def attended(self, reading: Reading, queries: Queries) -> tuple[Tensor, Tensor]:
        """Rows [N] of a query set, and what the probe read there."""
        if reading not in self.attention or queries not in self.queries:
            raise UserError(f"{self.of} reads {reading} at {queries!r} without declaring it: name both in its Needs.")
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

    def per_sequence(self, values: Tensor, rows: Tensor) -> Values:
        """One mean per sequence of `values` [N] at the flat `rows` [N]."""
        return Values(*self.mean(values, rows))

    def per_row(self, values: Tensor, rows: Tensor) -> Values:
        """The values of each sequence in a list."""
        sequence = self.sequence_of(rows)
        counts = torch.bincount(sequence, minlength=self.count)
        order = torch.argsort(sequence, stable=True)
        return Values(values[order.to(values.device)], counts, counts)

    def per_token(self, values: Tensor, rows: Tensor) -> Values:
        """One value per token of the completion, 0.0 where `rows` has none."""
        grid = values.new_zeros(self.regions.labels.numel()).index_put((rows.to(values.device),), values)
        tokens = self.regions.completion.flatten().nonzero()[:, 0]
        lists = self.per_row(grid[tokens.to(grid.device)], tokens)
        return replace(lists, counts=torch.bincount(self.sequence_of(rows), minlength=self.count))
