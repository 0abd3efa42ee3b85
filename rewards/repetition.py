"""A price on text that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rl_lvr.answers import text_of


def repetition(
    completions: Sequence[Any],
    *,
    n: int = 4,
    unit: Literal["words", "characters"] = "words",
    weight: float = -1.0,
    **_: Any,
) -> list[float]:
    """`weight` times the share of n-grams that occurred before: 1 - distinct / all (Yeo et al., 2502.03373).

    0 for a text of fewer than n units. Text only: latents and markers are not repetition.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1.")
    return [weight * _share(text_of(completion), n, unit) or 0.0 for completion in completions]


def _share(text: str, n: int, unit: str) -> float:
    pieces = text.casefold().split() if unit == "words" else list("".join(text.casefold().split()))
    grams = [tuple(pieces[i : i + n]) for i in range(len(pieces) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
