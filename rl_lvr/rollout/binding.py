"""A latent format bound to a model: what an engine may draw and take, and what ends its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.models import Family
from rl_lvr.rollout.checks import Limits


@dataclass(frozen=True)
class Bound:
    """The same in every engine of a model."""

    markers: FormatIds
    limits: Limits
    eos: tuple[int, ...]
    """Ids that end a sequence: those of the generation config and the tokenizer together, in order."""


def bound(
    latent_format: LatentFormat,
    family: Family,
    tokenizer: Any,
    generation_eos: int | Sequence[int] | None,
    max_positions: int | None = None,
) -> Bound:
    """Return `latent_format` bound to the model of `family`.

    Args:
        generation_eos: `eos_token_id` of the model's generation config.
        max_positions: Of the engine, where it takes fewer than the model.

    Raises:
        UserError: If a span has no room, or no completion could end.
    """
    text = family.config.get_text_config()
    markers = family.bind(latent_format, tokenizer, max_positions)
    listed = [generation_eos] if generation_eos is None or isinstance(generation_eos, int) else generation_eos
    eos = {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}
    if not eos:
        raise UserError("neither the generation config nor the tokenizer names an end-of-sequence token: set one.")
    clash = sorted(eos & set(markers.never_sampled))
    if clash:
        raise UserError(
            f"token id {clash[0]} ends a sequence and is also an image or latent marker, which is never sampled: "
            "no completion could end. Correct eos_token_id in the generation config."
        )
    limits = Limits(
        hidden_size=family.hidden_size,
        vocabulary=int(text.vocab_size),
        max_positions=int(text.max_position_embeddings) if max_positions is None else max_positions,
        image_token=family.placeholder_ids(tokenizer).get("image", -1),
        special_ids=frozenset({*tokenizer.all_special_ids, *eos}),
    )
    return Bound(markers, limits, tuple(sorted(eos)))
