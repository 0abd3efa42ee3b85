"""Qwen2 and Qwen3 without eyes: language models whose latents come from nothing but text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, TokenGrid


class TextOnly(Family):
    """Qwen2 (also 2.5) and Qwen3. There are no images, so all that is asked about images is empty or refused."""

    name = "Qwen2 and Qwen3 (text only)"
    model_types = ("qwen2", "qwen3")
    image_keys = ()
    text_only = True

    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        return {}

    def text_layers(self, model: nn.Module) -> nn.ModuleList:
        layers: nn.ModuleList = self.core(model).layers
        return layers

    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        return {"tower": [], "merger": []}

    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        self._refuse()

    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        return [] if not images else self._refuse()

    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        return [] if not images else self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(f"a {self.config.model_type} model takes no images: choose a vision-language model.")
