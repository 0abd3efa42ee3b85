"""Whether the answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_lvr.answers import Kind, Source, correct


def accuracy(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    *,
    kind: Kind = "auto",
    source: Source = "any",
    tolerance: float = 1e-6,
    wrong: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """1 if the completion's answer is the reference `answer`, else `wrong`.

    `kind`: choice (a letter), numeric (relative `tolerance`), exact (text, but for case and punctuation), math (LaTeX,
    by math-verify), or auto, which looks at the reference. `source`: where the answer stands: tags, boxed, line (the
    last), or any, which tries them in this order. Not scored: no reference, or one that cannot be read.
    """
    right = correct(completions, answer, kind, source, tolerance)
    return [None if r is None else 1.0 if r else wrong for r in right]
