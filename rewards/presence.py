"""A flat bonus for latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def presence(spans: Sequence[Sequence[Mapping[str, Any]]], *, value: float = 0.5, **_: Any) -> list[float]:
    """`value` for a completion with a closed span that was fed at least one latent, else 0.

    Paper B's flat bonus to the letter, which is also paid for an unclosed or empty span, is `paper_b_presence`.
    """
    return [value if any(s["status"] == "closed" and s["latents"] > 0 for s in row) else 0.0 for row in spans]
