"""Statistics of a part of the vocabulary, and how two parts become one.

The sums leave out the largest logit and are taken relative to it. Nothing cancels then: entropy and 1 - top-1 keep
their relative accuracy however confident a row is, where `logZ - sum(p z)` loses every digit below about 1e-5 nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

EMPTY = -1e30
"""The maximum of no logits. Finite, so that differences of maxima never become inf - inf."""
FLOOR = -1e4
"""z - m of a banned id instead of -inf: its exp is 0, and 0 times it is 0."""
NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Partial:
    """Sums over a set of logits z_j of each of N rows, with m = max z_j at j = a. Floats are float32 or float64."""

    maximum: Tensor
    """[N] m."""
    argmax: Tensor
    """[N] int64, a, the lowest of equals."""
    rest: Tensor
    """[N] sum of exp(z_j - m) over j != a; -1 for an empty set, so that 1 + rest counts what is there."""
    moment: Tensor
    """[N] sum of (z_j - m) exp(z_j - m) over j != a."""
    square: Tensor
    """[N] sum of exp(2 (z_j - m)) over j != a; -1 for an empty set."""
    top_values: Tensor
    """[N, k] the largest logits in any order, -inf where there are fewer."""
    top_ids: Tensor
    """[N, k] int64, their ids."""
    chosen: Tensor
    """[N] the chosen id's logit, -inf where it is not in the set."""
    next_maximum: Tensor
    """[N] the maximum of the row after this one, where the Kullback-Leibler divergence is wanted."""
    cross: Tensor
    """[N] sum of exp(z_j - m) (z'_j - m') over all j; z' is the row after this one, m' its maximum."""


def empty(rows: int, top_k: int, device: torch.device, dtype: torch.dtype) -> Partial:
    """The identity of `merge`."""

    def floats(value: float, *shape: int) -> Tensor:
        return torch.full((rows, *shape), value, device=device, dtype=dtype)

    def ids(*shape: int) -> Tensor:
        return torch.full((rows, *shape), NO_ID, device=device, dtype=torch.int64)

    return Partial(
        maximum=floats(EMPTY),
        argmax=ids(),
        rest=floats(-1.0),
        moment=floats(0.0),
        square=floats(-1.0),
        top_values=floats(-torch.inf, top_k),
        top_ids=ids(top_k),
        chosen=floats(-torch.inf),
        next_maximum=floats(EMPTY),
        cross=floats(0.0),
    )


def merge(a: Partial, b: Partial) -> Partial:
    """The statistics of two disjoint sets of ids together. Associative and commutative up to rounding."""
    b_wins = (b.maximum > a.maximum) | ((b.maximum == a.maximum) & (b.argmax < a.argmax))

    def pick(name: str) -> tuple[Tensor, Tensor]:
        of_a, of_b = getattr(a, name), getattr(b, name)
        return torch.where(b_wins, of_b, of_a), torch.where(b_wins, of_a, of_b)

    maximum, losing = pick("maximum")
    rest, losing_rest = pick("rest")
    moment, losing_moment = pick("moment")
    square, losing_square = pick("square")
    gap = losing - maximum
    scale = gap.exp()
    count = 1 + losing_rest
    top_values, order = torch.cat([a.top_values, b.top_values], 1).topk(a.top_values.shape[1], dim=1)
    next_maximum = torch.maximum(a.next_maximum, b.next_maximum)
    return Partial(
        maximum=maximum,
        argmax=pick("argmax")[0],
        rest=rest + scale * count,
        moment=moment + scale * (losing_moment + gap * count),
        square=square + scale * scale * (1 + losing_square),
        top_values=top_values,
        top_ids=torch.cat([a.top_ids, b.top_ids], 1).gather(1, order),
        chosen=torch.maximum(a.chosen, b.chosen),
        next_maximum=next_maximum,
        cross=_cross(a, maximum, next_maximum) + _cross(b, maximum, next_maximum),
    )


def _cross(part: Partial, maximum: Tensor, next_maximum: Tensor) -> Tensor:
    """`part.cross` relative to larger maxima. What has no weight counts nothing, even against a banned token's -inf."""
    scale = (part.maximum - maximum).exp()
    shifted = part.cross + (part.next_maximum - next_maximum) * (1 + part.rest)
    return torch.where(scale > 0, scale * shifted, torch.zeros_like(shifted))


def merge_shards(part: Partial, group: dist.ProcessGroup | None = None) -> Partial:
    """`part` of each process of `group` merged, on all of them: for a vocabulary split over processes."""
    ranks = dist.get_world_size(group)
    gathered: dict[str, list[Tensor]] = {}
    for field in fields(Partial):
        mine = getattr(part, field.name).contiguous()
        gathered[field.name] = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(gathered[field.name], mine, group=group)
    merged = Partial(**{name: parts[0] for name, parts in gathered.items()})
    for rank in range(1, ranks):
        merged = merge(merged, Partial(**{name: parts[rank] for name, parts in gathered.items()}))
    return merged


def rows_of(part: Partial, start: int, stop: int) -> Partial:
    """Rows `start` to `stop`."""
    return Partial(**{field.name: getattr(part, field.name)[start:stop] for field in fields(Partial)})


def stack_rows(parts: Sequence[Partial]) -> Partial:
    """The rows of `parts`, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Partial(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Partial)}
    )
