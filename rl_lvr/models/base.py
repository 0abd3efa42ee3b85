"""Family: the one interface behind which backbones differ. Each family is a module: all that differs stands in it.

Nothing here keeps state on a model: transformers caches M-RoPE offsets on the module (`rope_deltas`), and by
the next call they are another batch's. Positions are computed here and passed explicitly: nobody reads it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.models.tiny import TinySpec
from rl_lvr.wrapping import unwrapped


class TokenGrid(NamedTuple):
    """Tokens offset .. offset + rows * cols of an image's features show the whole image, row by row."""

    offset: int
    rows: int
    cols: int
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Part of the grid that the image fills: x0, y0, x1, y1 from 0 to 1. The rest of the grid is padding."""


class ImageFrame(NamedTuple):
    """Token ids around an image's tokens that vLLM writes itself, from one placeholder per image."""

    first: int
    """The token that an image's block begins with."""
    last: int
    """The token that it ends with; may be the same."""
    between: tuple[int, ...] = ()
    """Other tokens inside a block, such as those that name a tile."""


@dataclass(frozen=True)
class Positions:
    """Rotary positions of one batch: explicit, so that no model state takes part."""

    prefill: Tensor
    """`position_ids` for the forward over all of `input_ids`: [3, B, T] with M-RoPE, else [B, T]."""
    first_free: Tensor
    """[B]: position of the first token after the row. It is not T where a row is padded or holds images."""

    def decode(self, step: int) -> Tensor:
        """`position_ids` of generated token number `step` (from 0): [3, B, 1] with M-RoPE, else [B, 1]."""
        here = (self.first_free + step)[:, None]
        return here.expand(3, -1, -1) if self.prefill.ndim == 3 else here

    def select(self, rows: Tensor) -> Positions:
        """Only some rows, or rows repeated. `rows`: [b] indices."""
        return Positions(self.prefill.index_select(-2, rows), self.first_free.index_select(0, rows))


class Family(ABC):
    """One backbone family, bound to one checkpoint's config.

    A model argument may be wrapped (see `unwrapped`). Image inputs are what the processor returned for the
    images: its whole output, or the part of it that `image_inputs`, `split_images`, `join_images` return.
    """

    name: ClassVar[str]
    """What users call the family."""
    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` values that belong to it."""
    image_keys: ClassVar[tuple[str, ...]]
    """Names of the forward's inputs that belong to images."""
    text_only: ClassVar[bool] = False
    """No images at all: a tokenizer stands where the others have a processor, and a message's content is a string."""

    vllm_classes: ClassVar[Mapping[str, str]] = {}
    """vLLM's model class, as `module.Class`, by the config's `architectures`. Without one, engine `vllm` is refused."""
    vllm_single_picture: ClassVar[bool] = False
    """vLLM processes several images of a prompt differently from transformers, so a request may have one only."""

    tiny_tokens: ClassVar[Mapping[str, str]] = {}
    """Special tokens of a tiny model's tokenizer, under the names by which its processor asks for them."""
    tiny_image: ClassVar[str] = ""
    """What a tiny model's chat template writes for an image."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # ---- what an adapter must give

    @abstractmethod
    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        """Ids that must never be sampled, by meaning: image, video, their start and end markers."""

    @abstractmethod
    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """The modules before the text model, {"tower": [...], "merger": [...]}, to freeze one or both."""

    @abstractmethod
    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """For every image input how many of its rows (first dimension) belong to each image, in order."""

    @abstractmethod
    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        """[n_i, H] per image: exactly the vectors that the forward writes at the image's placeholders."""

    @abstractmethod
    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        """Where in each image's features the tokens are that show the whole image, row by row."""

    # ---- what most families share

    def core(self, model: nn.Module) -> Any:
        """The module whose forward takes the model's inputs and gives `last_hidden_state` after the norm."""
        return unwrapped(model).model

    def head(self, model: nn.Module) -> nn.Module:
        """Hidden states to logits."""
        head: nn.Module = unwrapped(model).get_output_embeddings()
        return head

    def text_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of the text model."""
        layers: nn.ModuleList = self.core(model).language_model.layers
        return layers

    def vision_parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """All parameters before the text model, in the parts of `vision_parts`."""
        return {
            part: [parameter for module in modules for parameter in module.parameters()]
            for part, modules in self.vision_parts(model).items()
        }

    def bind(self, latent_format: LatentFormat, processor: Any, max_positions: int | None = None) -> FormatIds:
        """The format's markers in the vocabulary of `processor`, which may be a tokenizer.

        Refused if a span has no room in the model, or in the `max_positions` of an engine that takes fewer.
        """
        positions = int(self.config.get_text_config().max_position_embeddings)
        latent_format.require_room(positions if max_positions is None else min(positions, max_positions))
        tokenizer = getattr(processor, "tokenizer", processor)
        return latent_format.bind(tokenizer, self.placeholder_ids(tokenizer))

    @property
    def image_token(self) -> int:
        """Id of the placeholder that image features are written at; -1 without images."""
        return -1 if self.text_only else int(self.config.image_token_id)

    @property
    def hidden_size(self) -> int:
        """Width of the text model, hence of a latent."""
        return int(self.config.get_text_config().hidden_size)

    def positions(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> Positions:
        """Positions of `input_ids` [B, T], padded left or right; here those of a plain text model."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        return Positions((mask.cumsum(-1) - 1).clamp(min=0), mask.sum(-1))

    def image_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The image inputs in a processor's output, complete enough to be split. {} without images."""
        return {
            key: value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
            for key in self.image_keys
            if (value := batch.get(key)) is not None
        }

    def count_images(self, images: Mapping[str, Any]) -> int:
        images = self.image_inputs(images)
        return len(self.rows_per_image(images)[next(iter(images))]) if images else 0

    def split_images(self, images: Mapping[str, Any], images_per_row: Sequence[int]) -> list[dict[str, Tensor]]:
        """Image inputs of a batch -> those of each row; {} for a row without images."""
        images = self.image_inputs(images)
        self._check_count(images, images_per_row)
        if not images:
            return [{} for _ in images_per_row]
        ends = [0, *itertools.accumulate(images_per_row)]
        pieces = {}
        for key, rows in self.rows_per_image(images).items():
            sizes = [sum(rows[a:b]) for a, b in itertools.pairwise(ends)]
            pieces[key] = images[key].split(sizes)
        return [
            {key: piece[i] for key, piece in pieces.items()} if count else {} for i, count in enumerate(images_per_row)
        ]

    def join_images(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Image inputs of rows -> those of their batch, in this order. Undoes `split_images`.

        A row without images is {}, or is left out.
        """
        rows = [row for row in rows if row]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]} if rows else {}

    def complete_images(self, images: dict[str, Tensor], images_per_row: Sequence[int]) -> dict[str, Tensor]:
        """Add image inputs that the forward takes and that TRL's batches of rows lack; here none."""
        return images

    # ---- vLLM's side

    def vllm_frame(self, tokenizer: Any) -> ImageFrame | None:
        """Tokens beside the image tokens that vLLM writes itself, and that a prompt for it must not hold."""
        return None

    def released_name(self, name: str) -> str:
        """The name of a weight in released checkpoints, which vLLM's loaders expect, of a weight in transformers."""
        return name

    # ---- a tiny model, for tests and the lab

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        """Build (model, processor) of this shape with random weights. `tokenizer` has `tiny_tokens`."""
        raise UserError(f"{cls.name} brings no tiny model: give {cls.__name__} a method `tiny`.")

    # ---- helpers for adapters

    def _check_count(self, images: Mapping[str, Tensor], images_per_row: Sequence[int]) -> None:
        count = self.count_images(images)
        if sum(images_per_row) != count:
            raise ValueError(f"{count} images cannot be split into rows of {list(images_per_row)} images.")

    def _as_embeddings(self, model: nn.Module, features: Sequence[Tensor]) -> list[Tensor]:
        """Features as the forward writes them: in the place and type of the text embeddings."""
        weight = unwrapped(model).get_input_embeddings().weight
        return [feature.to(weight.device, weight.dtype) for feature in features]

    def _token_ids(self, tokenizer: Any, names: Mapping[str, str | None]) -> dict[str, int]:
        """Ids of tokens that this family's tokenizers have; a processor will do for the tokenizer."""
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        vocabulary = tokenizer.get_vocab()
        ids = {}
        for what, token in names.items():
            if token is None or token not in vocabulary:
                raise UserError(
                    f"the tokenizer has no {what} token{f' {token!r}' if token else ''}: "
                    f"it does not belong to a {self.name} model; load both from one checkpoint."
                )
            ids[what] = int(vocabulary[token])
        return ids
