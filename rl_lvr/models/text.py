"""Text-only Qwen2 and Qwen3: language models whose latents come from text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, TokenGrid
from rl_lvr.models.tiny import TinySpec, rope, text_config


class TextOnly(Family):
    """Qwen2 (also 2.5) and Qwen3. There are no images, so all that is asked about images is empty or refused."""

    name = "Qwen2 and Qwen3 (text only)"
    model_types = ("qwen2", "qwen3")
    image_keys = ()
    text_only = True
    vllm_classes: ClassVar = {
        "Qwen2ForCausalLM": "vllm.model_executor.models.qwen2.Qwen2ForCausalLM",
        "Qwen3ForCausalLM": "vllm.model_executor.models.qwen3.Qwen3ForCausalLM",
    }

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

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

        shape = text_config(spec, tokenizer, rope_parameters=rope())
        if spec.family == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**shape)), tokenizer
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=spec.head_dim)), tokenizer
