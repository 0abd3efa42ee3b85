"""Whether the latents were needed: the same completion, rolled out again without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_lvr.answers import Kind, Source, correct


def necessity(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    necessity_completions: Sequence[str | None],
    *,
    value: float = 1.0,
    kind: Kind = "auto",
    source: Source = "any",
    **_: Any,
) -> list[float | None]:
    """Latent necessity as paper B weighs it (2605.18641): `value` if right with the latents and wrong without.

    -0.5 `value` if right both times, or wrong with and right without; 0 if wrong both times, or if there were no
    latents. `necessity_completions` comes from the trainer: for each completion what was generated from the prompt, the
    text before its first span and an empty pair of markers, or None where it has no span. It is judged whole, and a
    truncated span counts; the authors' code does neither: `paper_b_necessity`.
    """
    return weighed(completions, necessity_completions, answer, value, kind, source)


def weighed(
    completions: Sequence[Any],
    without: Sequence[str | None],
    answer: Sequence[str | None],
    value: float,
    kind: Kind,
    source: Source,
) -> list[float | None]:
    """Paper B's three values. `without` are the texts that came of it without latents; None is 0."""
    right = correct(completions, answer, kind, source)
    right_without = correct(["" if text is None else text for text in without], answer, kind, source)
    values: list[float | None] = []
    for first, second, text in zip(right, right_without, without, strict=True):
        if first is None:
            values.append(None)
        elif text is None or not (first or second):
            values.append(0.0)
        else:
            values.append(value if first and not second else -0.5 * value)
    return values
