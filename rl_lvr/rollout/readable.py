"""A completion as text for people: each latent span in brackets, where it stands."""

from __future__ import annotations

from typing import Any

from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import find_spans
from rl_lvr.latents.text import completion_text
from rl_lvr.rollout.types import Rollout


def readable(rollout: Rollout, tokenizer: Any, markers: FormatIds) -> str:
    """The completion's text with ``⟦6 latents⟧`` for a span that was fed 6 vectors, ``⟦6 empty slots⟧`` for one that
    was fed none."""
    fed = set(rollout.latent_positions)
    pieces: list[str] = []
    at = len(rollout.prompt_ids)
    for span in find_spans(rollout.ids, markers).spans:
        if span.stop <= at:
            continue  # the prompt's
        pieces.append(completion_text(rollout.ids[at : span.begin], tokenizer, markers))
        vectors = sum(position in fed for position in range(span.begin, span.stop))
        count, what = (vectors, "latent") if vectors or not span.slots else (span.slots, "empty slot")
        pieces.append(f"⟦{count} {what}{'' if count == 1 else 's'}⟧")
        at = span.stop
    pieces.append(completion_text(rollout.ids[at:], tokenizer, markers))
    return "".join(pieces)
