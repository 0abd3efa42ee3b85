"""Which vector is fed at a latent position: the model's own, explored, replaced or supplied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_lvr.latents.density import Law, explore
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.rollout.types import Request, Sampling


def with_noise(
    own: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sigma: Tensor,
    matched: Tensor,
    unit: Tensor,
    law: Law = "gaussian",
) -> Tensor:
    """`own` [B, H], explored where `sigma` [B] is above 0, replaced by noise where `matched` or `unit` [B] says so."""
    noise = keyed_normal(seeds, positions, own.shape[-1])
    length = own.float().norm(dim=-1, keepdim=True)
    same_norm = noise * (length / noise.norm(dim=-1, keepdim=True))
    explored = explore(own.float(), noise, sigma, law).to(own.dtype)
    z = torch.where((sigma > 0)[:, None], explored, own)
    z = torch.where(matched[:, None], same_norm.to(own.dtype), z)
    return torch.where(unit[:, None], noise.to(own.dtype), z)


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
        self._seeds = seeds
        self._dtype = dtype
        self._sigma = rows_with(Intervention.OWN) * sampling.sigma
        self._law = sampling.noise
        self._zeros = rows_with(Intervention.ZEROS)
        self._matched = rows_with(Intervention.NOISE)
        self._unit = rows_with(Intervention.UNIT_NOISE)
        self._supplied = torch.tensor([r.intervention.needs_vectors for r in requests], device=device)
        own_noise = sampling.sigma > 0 and any(r.intervention is Intervention.OWN for r in requests)
        self._any_noise = own_noise or any(
            r.intervention in (Intervention.NOISE, Intervention.UNIT_NOISE) for r in requests
        )
        self._any_zeros = any(r.intervention is Intervention.ZEROS for r in requests)
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
        z = own
        if self._any_noise:
            z = with_noise(own, self._seeds, positions, self._sigma, self._matched, self._unit, self._law)
        if self._any_zeros:
            z = z.masked_fill(self._zeros[:, None], 0)
        if self._table is not None:
            rows = torch.arange(len(own), device=own.device)
            z = torch.where(self._supplied[:, None], self._table[rows, index.clamp(min=0) % self._counts], z)
        return z.to(self._dtype)

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        for name in ("feeds", "_seeds", "_sigma", "_zeros", "_matched", "_unit", "_supplied", "_counts"):
            setattr(self, name, getattr(self, name)[rows])
        if self._table is not None:
            self._table = self._table[rows]
