"""The shape of a tiny model, and the parts of its configuration that families share.

A family builds its own tiny model (`Family.tiny`); `rl_lvr.lab.tiny` saves it as a folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError
from rl_lvr.latents.format import get_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKENS = 256
"""Default upper bound of tokens per image, in families that take images of any size."""
MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class TinySpec:
    """The shape of a tiny model. Everything is deterministic in the spec."""

    family: str
    """The `model_type` of a family that has a tiny model (`Family.tiny`)."""
    layers: int = 2
    hidden: int = 64
    heads: int = 2
    """Keep hidden / heads at 32 or more: vLLM's CPU attention has no smaller head."""
    kv_heads: int = 1
    intermediate: int = 128
    vision_depth: int = 2
    vision_hidden: int = 32
    vision_heads: int = 2
    patch: int = 14
    merge: int = 2
    """Patches per token along each side, in families that merge patches."""
    image_size: int | None = None
    """Side of a tile in pixels, in families that cut images into tiles: 4 patches if not given."""
    min_pixels: int | None = None
    """Smallest image that is not enlarged, in families that take any size: one token if not given."""
    max_pixels: int | None = None
    """Largest image that is not shrunk, in families that take any size: `IMAGE_TOKENS` tokens if not given."""
    words: tuple[str, ...] = ()
    """Each is one token, with and without a space before it. Other text is encoded in smaller pieces."""
    latent_formats: tuple[str, ...] = ("lvr",)
    """Presets of `rl_lvr.latents.format` whose marker tokens the tokenizer holds."""
    init_std: float = 0.2
    """Large, so that hidden states of untrained models differ clearly between inputs; 0.02 to train."""
    tie: bool = False
    max_positions: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for width, heads in (("hidden", "heads"), ("vision_hidden", "vision_heads"), ("heads", "kv_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"tiny model: {width} ({getattr(self, width)}) must be a multiple of "
                    f"{heads} ({getattr(self, heads)})."
                )
        if self.head_dim % 8:
            raise UserError(f"tiny model: hidden / heads is {self.head_dim}; it must be a multiple of 8.")
        if self.tile % (self.patch * self.merge):
            raise UserError(
                f"tiny model: image_size ({self.tile}) must be a multiple of patch x merge ({self.token_pixels})."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def tile(self) -> int:
        return self.image_size or 4 * self.patch

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one merged image token covers."""
        return self.patch * self.merge

    @property
    def pixel_limits(self) -> dict[str, int]:
        area = self.token_pixels**2
        return {
            "shortest_edge": self.min_pixels or area,
            "longest_edge": self.max_pixels or IMAGE_TOKENS * area,
        }

    @property
    def markers(self) -> tuple[str, ...]:
        """Marker tokens of all latent formats, each once (two presets may share some)."""
        formats = [get_format(name) for name in self.latent_formats]
        return tuple(dict.fromkeys(token for item in formats for token in item.tokens))


def text_config(spec: TinySpec, tokenizer: PreTrainedTokenizerBase, **more: Any) -> dict[str, Any]:
    """Return the arguments of a text model's config."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_positions,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **more,
    }


def rope(**more: Any) -> dict[str, Any]:
    """Return `rope_parameters`."""
    return {"rope_type": "default", "rope_theta": 10000.0, **more}
