"""How sure the model is at its latents (paper A, 2605.02735). The paper's text and its code define two rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def confidence_text(entropy_drop: Sequence[float], **_: Any) -> list[float]:
    """Paper A's progression as its text has it (Eq. 5, second-hand): the mean over latents of max(0, E_i - E_{i+1})."""
    return list(entropy_drop)


confidence_text.signals = ["entropy_drop"]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ConfidenceCode:
    """Paper A's Stage II reward as its code has it: confidence of the top `k`, plus `progression` times its log-ratio.

    `progression` is the paper's w = 0.05.
    """

    k: int = 10
    progression: float = 0.05

    @property
    def column(self) -> str:
        weight = f"{self.progression:g}".translate(str.maketrans(".-+", "_mp"))
        return "confidence_reward" if self == ConfidenceCode() else f"confidence_reward_{self.k}_{weight}"

    @property
    def signals(self) -> list[dict[str, Any]]:
        return [{"confidence_reward": {"k": self.k, "weight": self.progression, "name": self.column}}]

    def __call__(self, **columns: Any) -> list[float]:
        return list(columns[self.column])
