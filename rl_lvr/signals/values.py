"""What a signal says of a batch: as the tensors that its definition returns, and as the lists that rewards read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Column:
    """A signal's values: one number per sequence, or one list per sequence."""

    values: list[float] | list[list[float]]
    counts: list[int]
    """How many terms each sequence's value rests on. Where it is 0, the value is 0.0 (or an empty list)."""


@dataclass(frozen=True)
class Values:
    """The same as tensors, as `Forward.per_sequence`, `per_row` and `per_token` make them."""

    values: Tensor
    """[S], one number per sequence; with `lengths` [N], the lists of all sequences behind each other."""
    counts: Tensor
    """[S] int64, as those of a `Column`."""
    lengths: Tensor | None = None
    """[S] int64, how many of `values` belong to each sequence."""

    def column(self) -> Column:
        """The values as Python lists."""
        if self.lengths is None:
            return Column(self.values.tolist(), self.counts.tolist())
        return Column([part.tolist() for part in self.values.split(self.lengths.tolist())], self.counts.tolist())


def problem_of(found: object, sequences: int) -> str | None:
    """How the sentence "the signal ..." goes on if `found` are not `Values` of `sequences` sequences; else None."""
    if not isinstance(found, Values):
        return f"returned a {type(found).__name__}: return Values, as f.per_sequence(values, rows) makes them"
    parts = {"values": found.values, "counts": found.counts, "lengths": found.lengths}
    for name, part in parts.items():
        if not isinstance(part, Tensor) and (part is not None or name != "lengths"):
            return f"returned {name} of type {type(part).__name__}: return tensors, for gradients flow through them"
    if not found.values.is_floating_point():
        return f"returned values of {found.values.dtype}: return floating-point numbers"
    for name in ("counts", "lengths"):
        part = parts[name]
        if part is not None and (part.shape != (sequences,) or part.is_floating_point()):
            return f"returned {name} {tuple(part.shape)} {part.dtype} for {sequences} rollouts: return one integer each"
    wanted = sequences if found.lengths is None else int(found.lengths.sum())
    if found.values.shape != (wanted,):
        cure = "return one each, or say in lengths how many" if found.lengths is None else "lengths must sum up to them"
        return f"returned values {tuple(found.values.shape)} for {sequences} rollouts: {cure}"
    return None


def not_finite(found: Values) -> tuple[int, float] | None:
    """The first rollout with a value that is not finite, and that value."""
    wrong = (~found.values.isfinite()).nonzero()[:, 0]
    if not len(wrong):
        return None
    place, row = int(wrong[0]), int(wrong[0])
    if found.lengths is not None:
        row = int(torch.searchsorted(found.lengths.cumsum(0).to(wrong.device), wrong[0], right=True))
    return row, float(found.values[place])
