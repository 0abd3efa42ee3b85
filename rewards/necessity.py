"""Whether the latents were needed: the same completion, rolled out again without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_lvr.answers import Kind, Source, correct


def necessity(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    necessity_completions: Sequence[Any],
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
    right = correct(completions, answer, kind, source)
    texts = ["" if without is None else without for without in necessity_completions]
    right_without = correct(texts, answer, kind, source)
    values: list[float | None] = []
    for with_, without, completion in zip(right, right_without, necessity_completions, strict=True):
        if with_ is None:
            values.append(None)
        elif completion is None or not (with_ or without):
            values.append(0.0)
        else:
            values.append(value if with_ and not without else -0.5 * value)
    return values
