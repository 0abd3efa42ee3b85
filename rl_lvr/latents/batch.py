"""LatentBatch: the one carrier of latents, from the engine that fed them to the loss that prices them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl_lvr.errors import UserError

_KIND = "rl-lvr latents 1"


@dataclass(frozen=True)
class LatentBatch:
    """Latents of B rows, padded on the right to the longest row.

    A vector and its position share one index, so no operation here can move a vector to another row or place.
    Padding is position -1 with a zero vector. Positions count from 0 in the row's own token ids as they stand
    beside this batch; `shifted` moves them when those ids are padded on the left or joined to a prompt.
    """

    values: Tensor
    """[B, N, H], the vectors that were fed, in the engine's precision."""
    positions: Tensor
    """[B, N] int64, strictly increasing within a row, -1 behind the last latent."""
    sigma: Tensor
    """[B] float32, standard deviation of the exploration noise in `values`; 0 where there is none."""

    def __post_init__(self) -> None:
        shape = self.positions.shape
        fits = self.values.ndim == 3 and self.values.shape[:2] == shape and self.sigma.shape == shape[:1]
        if self.positions.ndim != 2 or not fits:
            raise ValueError(
                f"LatentBatch shapes disagree: values {tuple(self.values.shape)}, positions "
                f"{tuple(self.positions.shape)}, sigma {tuple(self.sigma.shape)}."
            )
        if self.positions.dtype != torch.long or not self.values.is_floating_point():
            raise ValueError(
                f"a LatentBatch holds floating-point values and int64 positions, not {self.values.dtype} "
                f"and {self.positions.dtype}."
            )

    # ---- make

    @classmethod
    def from_rows(
        cls,
        values: Sequence[Tensor],
        positions: Sequence[Sequence[int] | Tensor],
        sigma: Sequence[float] | Tensor | None = None,
        *,
        hidden_size: int | None = None,
    ) -> LatentBatch:
        """Pad rows of vectors ([n_i, H]) and their positions. `hidden_size` is needed only if there is no row."""
        if len(values) != len(positions):
            raise ValueError(f"{len(values)} rows of vectors but {len(positions)} rows of positions.")
        if not values and hidden_size is None:
            raise ValueError("a LatentBatch without rows needs its hidden size.")
        for row, vectors in enumerate(values):
            if vectors.ndim != 2 or (vectors.shape[1], vectors.dtype) != (values[0].shape[-1], values[0].dtype):
                raise ValueError(
                    f"row {row} is {tuple(vectors.shape)} {vectors.dtype} beside row 0, which is "
                    f"{tuple(values[0].shape)} {values[0].dtype}: rows are [n, H] of one H and one precision."
                )
        width = max((v.shape[0] for v in values), default=0)
        first = values[0] if values else torch.empty(0, hidden_size or 0)
        padded = first.new_zeros(len(values), width, first.shape[-1])
        where = torch.full((len(values), width), -1, dtype=torch.long, device=first.device)
        for row, (vectors, places) in enumerate(zip(values, positions, strict=True)):
            if vectors.shape[0] != len(places):
                raise ValueError(f"row {row}: {vectors.shape[0]} vectors but {len(places)} positions.")
            padded[row, : vectors.shape[0]] = vectors
            found = torch.as_tensor(places, dtype=torch.long)
            _check_order(found, row)
            where[row, : len(places)] = found.to(first.device)
        noise = torch.zeros(len(values)) if sigma is None else torch.as_tensor(sigma, dtype=torch.float32)
        return cls(padded, where, noise.to(first.device))

    @classmethod
    def from_flat(cls, rows: Tensor, positions: Tensor, values: Tensor, batch_size: int) -> LatentBatch:
        """Vectors `values` [L, H] at `positions` [L] of `rows` [L], both sorted by row, then position."""
        counts = torch.bincount(rows, minlength=batch_size)
        starts = counts.cumsum(0) - counts
        columns = torch.arange(len(rows), device=rows.device) - starts[rows]
        width = int(counts.max()) if batch_size else 0
        padded = values.new_zeros(batch_size, width, values.shape[-1]).index_put((rows, columns), values)
        where = torch.full((batch_size, width), -1, dtype=torch.long, device=rows.device)
        where[rows, columns] = positions
        return cls(padded, where, torch.zeros(batch_size, device=rows.device))

    @classmethod
    def empty(cls, rows: int, hidden_size: int, *, dtype: torch.dtype = torch.float32) -> LatentBatch:
        """Rows without latents."""
        return cls(
            torch.zeros(rows, 0, hidden_size, dtype=dtype),
            torch.zeros(rows, 0, dtype=torch.long),
            torch.zeros(rows),
        )

    # ---- look

    @property
    def mask(self) -> Tensor:
        """[B, N], True where there is a latent."""
        return self.positions >= 0

    @property
    def counts(self) -> Tensor:
        """[B], latents per row."""
        return self.mask.sum(1)

    @property
    def hidden_size(self) -> int:
        return self.values.shape[-1]

    def __len__(self) -> int:
        return self.positions.shape[0]

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Vectors [n, H] and positions [n] of one row, without padding."""
        kept = self.mask[index]
        return self.values[index, kept], self.positions[index, kept]

    # ---- rearrange

    def select(self, rows: Tensor | Sequence[int]) -> LatentBatch:
        """Rows by index, in that order; an index may occur several times."""
        index = torch.as_tensor(rows, device=self.positions.device)
        if index.dtype == torch.bool:
            raise ValueError("select takes row numbers, not a mask.")
        index = index.long()  # an empty list arrives as floats
        return LatentBatch(self.values[index], self.positions[index], self.sigma[index])

    def split(self, sizes: int | Sequence[int]) -> list[LatentBatch]:
        """Consecutive pieces of rows."""
        rows = torch.arange(len(self), device=self.positions.device)
        return [self.select(chunk) for chunk in rows.split(sizes if isinstance(sizes, int) else list(sizes))]

    @classmethod
    def concat(cls, batches: Iterable[LatentBatch]) -> LatentBatch:
        """Rows of several batches, one after another, padded to the widest."""
        batches = list(batches)
        if not batches:
            raise ValueError("concat needs at least one LatentBatch.")
        width = max(batch.positions.shape[1] for batch in batches)
        padded = [batch.padded(width) for batch in batches]
        return cls(
            torch.cat([p.values for p in padded]),
            torch.cat([p.positions for p in padded]),
            torch.cat([p.sigma for p in padded]),
        )

    def padded(self, width: int) -> LatentBatch:
        """The same rows with room for `width` latents each."""
        more = width - self.positions.shape[1]
        if more < 0:
            raise ValueError(f"cannot pad {self.positions.shape[1]} latents per row to {width}.")
        rows = len(self)
        values = torch.cat([self.values, self.values.new_zeros(rows, more, self.hidden_size)], 1)
        return replace(
            self,
            values=values,
            positions=torch.cat([self.positions, self.positions.new_full((rows, more), -1)], 1),
        )

    def trimmed(self) -> LatentBatch:
        """The same rows without columns that are padding in all of them."""
        width = int(self.counts.max()) if len(self) else 0
        return replace(self, values=self.values[:, :width], positions=self.positions[:, :width])

    def shifted(self, offset: int | Tensor) -> LatentBatch:
        """Positions moved by `offset`, one number or one per row [B]. Padding stays padding."""
        if isinstance(offset, Tensor) and offset.shape != self.sigma.shape:
            raise ValueError(f"{len(self)} rows cannot be shifted by offsets of shape {tuple(offset.shape)}.")
        moved = self.positions + (offset if isinstance(offset, int) else offset[:, None].to(self.positions))
        if bool((moved[self.mask] < 0).any()):
            raise ValueError("a shift moved a latent before the start of its row.")
        return replace(self, positions=torch.where(self.mask, moved, self.positions))

    def to(self, *args: Any, **kwargs: Any) -> LatentBatch:
        """Move to a device, or change the precision of `values`. The arguments are those of `Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        return LatentBatch(values, self.positions.to(values.device), self.sigma.to(values.device))

    # ---- through dicts of tensors and files

    def as_tensors(self, prefix: str = "latent_") -> dict[str, Tensor]:
        """Tensors with a leading batch dimension: what TRL shuffles and splits along with its own."""
        return {
            f"{prefix}values": self.values,
            f"{prefix}positions": self.positions,
            f"{prefix}sigma": self.sigma,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str = "latent_") -> LatentBatch:
        """The inverse of `as_tensors`."""
        return cls(*(tensors[f"{prefix}{name}"] for name in ("values", "positions", "sigma")))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; `load` gives back every bit."""
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.as_tensors("").items()}
        save_file(tensors, str(path), metadata={"format": _KIND})

    @classmethod
    def load(cls, path: str | Path) -> LatentBatch:
        """Read what `save` wrote."""
        if not Path(path).is_file():
            raise UserError(f"no latents file at {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                kind = (file.metadata() or {}).get("format")
                if kind != _KIND:
                    raise ValueError(f"its format is {kind!r}, expected {_KIND!r}")
                batch = cls.from_tensors({name: file.get_tensor(name) for name in file.keys()}, "")  # noqa: SIM118
            for row, count in enumerate(batch.counts.tolist()):
                _check_order(batch.positions[row, :count], row)
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} is no latents file of rl-lvr, or it is damaged ({error}).") from error
        return batch


def _check_order(places: Tensor, row: int) -> None:
    """Two vectors at one place would make the result depend on which is written last."""
    if bool((places < 0).any()) or bool((places.diff() <= 0).any()):
        raise ValueError(f"row {row}: positions must be 0 or more and strictly increasing, not {places.tolist()}.")
