"""Whether the answer is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rl_lvr.answers import Kind, Source, Verdict, matches


def accuracy(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    *,
    kind: Kind = "auto",
    source: Source = "any",
    tolerance: float = 1e-6,
    wrong: float = 0.0,
    log_metric: Callable[[str, float], None] | None = None,
    reward_name: str = "accuracy",
    **_: Any,
) -> list[float | None]:
    """1 if the completion's answer is the reference `answer`, else `wrong`.

    `kind`: choice (a letter), numeric (relative `tolerance`), exact (text, but for case and punctuation), math (LaTeX,
    by math-verify), or auto, which looks at the reference. `source`: where the answer stands: tags, boxed, line (the
    last), or any, which tries them in this order. Not scored: no reference, or one that cannot be read. The share of
    completions out of which no answer can be read is logged as rewards/<reward_name>/unreadable.
    """
    found = matches(completions, answer, kind, source, tolerance)
    if log_metric is not None and found:
        unreadable = sum(one.verdict is Verdict.UNREADABLE for one in found)
        log_metric(f"rewards/{reward_name}/unreadable", unreadable / len(found))
    return [None if one.right is None else 1.0 if one.right else wrong for one in found]
