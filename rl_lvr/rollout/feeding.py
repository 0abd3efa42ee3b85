"""Which vector is fed at a latent position: the model's own, explored, replaced or supplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rl_lvr.latents.density import Law, explore
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.rollout.types import Request, Sampling


@dataclass(frozen=True)
class FedRows:
    """How the latents of rows are made; each [B]."""

    seeds: Tensor
    sigma: Tensor
    """Of the exploration noise, 0 without."""
    matched: Tensor
    """Bool, noise of the same norm stands in for the latent."""
    unit: Tensor
    """Bool, noise of variance 1 does."""
    zeros: Tensor
    supplied: Tensor
    """Bool, a vector of the request's own does."""

    def select(self, rows: Tensor) -> FedRows:
        return FedRows(*(getattr(self, entry.name)[rows] for entry in fields(self)))


def fed(
    own: Tensor, positions: Tensor, rows: FedRows, given: Tensor | None, *, noise: bool, law: Law = "gaussian"
) -> Tensor:
    """What is fed at absolute `positions` [B] where the model's own latents would be `own` [B, H], in its precision.

    Args:
        given: [B, H], vectors of the rows that have `supplied`; None if none has.
        noise: Whether any row may have noise.
    """
    z = own
    if noise:
        drawn = keyed_normal(rows.seeds, positions, own.shape[-1])
        length = own.float().norm(dim=-1, keepdim=True)
        same_norm = drawn * (length / drawn.norm(dim=-1, keepdim=True))
        explored = explore(own.float(), drawn, rows.sigma, law).to(own.dtype)
        z = torch.where((rows.sigma > 0)[:, None], explored, own)
        z = torch.where(rows.matched[:, None], same_norm.to(own.dtype), z)
        z = torch.where(rows.unit[:, None], drawn.to(own.dtype), z)
    z = z.masked_fill(rows.zeros[:, None], 0)
    return z if given is None else torch.where(rows.supplied[:, None], given, z)


class VectorSource:
    """The vectors of one batch, row by row. Rows may have different interventions."""

    def __init__(
        self, requests: Sequence[Request], seeds: Tensor, sampling: Sampling, hidden_size: int, dtype: torch.dtype
    ) -> None:
        device = seeds.device

        def rows_with(*kinds: Intervention) -> Tensor:
            return torch.tensor([request.intervention in kinds for request in requests], device=device)

        self.feeds = torch.tensor([r.intervention.feeds_vectors for r in requests], device=device)
        """[B] bool, rows whose latent positions take a vector at all."""
        self._rows = FedRows(
            seeds=seeds,
            sigma=rows_with(Intervention.OWN) * sampling.sigma,
            matched=rows_with(Intervention.NOISE),
            unit=rows_with(Intervention.UNIT_NOISE),
            zeros=rows_with(Intervention.ZEROS),
            supplied=torch.tensor([r.intervention.needs_vectors for r in requests], device=device),
        )
        self._dtype, self._law = dtype, sampling.noise
        self._noise = bool(((self._rows.sigma > 0) | self._rows.matched | self._rows.unit).any())
        self._table, self._counts = self._supplied_vectors(requests, hidden_size, device)

    def _supplied_vectors(
        self, requests: Sequence[Request], hidden_size: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor]:
        """[B, N, H] padded, and how many each row has; rows without vectors count 1 so that a modulo is defined."""
        rows = [r.vectors if r.intervention.needs_vectors else None for r in requests]
        counts = torch.tensor([1 if v is None else len(v) for v in rows], device=device)
        if all(v is None for v in rows):
            return None, counts
        table = torch.zeros(len(rows), int(counts.max()), hidden_size, dtype=self._dtype, device=device)
        for i, vectors in enumerate(rows):
            if vectors is not None:
                table[i, : len(vectors)] = vectors.to(device, self._dtype)
        return table, counts

    def __call__(self, own: Tensor, positions: Tensor, index: Tensor) -> Tensor:
        """What to feed at absolute `positions` [B] as latent number `index` [B] of each completion. [B, H]

        `own` [B, H] is f(h). The result is in the model's precision: a rounded vector is the action taken.
        """
        given = None
        if self._table is not None:
            rows = torch.arange(len(own), device=own.device)
            given = self._table[rows, index.clamp(min=0) % self._counts]
        return fed(own, positions, self._rows, given, noise=self._noise, law=self._law).to(self._dtype)

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        self._rows, self.feeds, self._counts = self._rows.select(rows), self.feeds[rows], self._counts[rows]
        if self._table is not None:
            self._table = self._table[rows]
