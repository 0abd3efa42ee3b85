"""A price on length, once shorter is known to suffice."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from rl_lvr.answers import Kind, Source, correct


def length_excess(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[str | None],
    group: Sequence[Hashable],
    *,
    per_token: float = -0.001,
    kind: Kind = "auto",
    source: Source = "any",
    **_: Any,
) -> list[float]:
    """`per_token` for every token beyond the shortest correct completion of the group.

    `per_token * max(0, length - shortest)`; 0 in a group without a correct completion. Paper B's reference is
    the shortest of the whole run (`paper_b_length`). What is correct is decided as
    in `accuracy`; `group` says which completions answer one prompt.
    """
    shortest: dict[Hashable, int] = {}
    for ids, right, which in zip(completion_ids, correct(completions, answer, kind, source), group, strict=True):
        if right:
            shortest[which] = min(len(ids), shortest.get(which, len(ids)))
    excess = [
        max(0, len(ids) - shortest.get(which, len(ids))) for ids, which in zip(completion_ids, group, strict=True)
    ]
    return [per_token * tokens if tokens else 0.0 for tokens in excess]
