"""SmolVLM as a family, written outside of rl_lvr as another package would bring it: found by an entry point.

Of another kind than ours: image inputs have a row of the batch as their first dimension, padded with empty images, and
the prompt frames an image's tokens with tokens that vLLM writes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import install
from torch import Tensor, nn

from rl_lvr.models import Family, ImageFrame, TinySpec, TokenGrid, registry
from rl_lvr.models.tiny import MEAN_STD, rope, text_config


class SmolVLM(Family):
    """SmolVLM without image splitting: every image is one square tile."""

    name = "SmolVLM"
    model_types = ("smolvlm",)
    image_keys = ("pixel_values", "pixel_attention_mask")
    vllm_classes: ClassVar = {
        "SmolVLMForConditionalGeneration": "vllm.model_executor.models.smolvlm.SmolVLMForConditionalGeneration"
    }
    tiny_tokens: ClassVar = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
    }
    tiny_image = "<image>"

    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        names = {"frame": "<fake_token_around_image>", "whole": "<global-img>", "video": "<video>"}
        return {"image": int(self.config.image_token_id)} | self._token_ids(tokenizer, names)

    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        core = self.core(model)
        return {"tower": [core.vision_model], "merger": [core.connector]}

    def text_layers(self, model: nn.Module) -> nn.ModuleList:
        return self.core(model).text_model.layers

    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Of images that stand one after another: `split_images` takes the rows of a batch apart."""
        real = _real(images).sum().item()
        return dict.fromkeys(self.image_keys, [1] * int(real))

    def split_images(self, images: Mapping[str, Any], images_per_row: Sequence[int]) -> list[dict[str, Tensor]]:
        images = self.image_inputs(images)
        self._check_count(images, images_per_row)
        if not images:
            return [{} for _ in images_per_row]
        flat = {key: images[key].flatten(0, 1)[_real(images).flatten()] for key in self.image_keys}
        pieces = {key: value.split(list(images_per_row)) for key, value in flat.items()}
        return [
            {key: piece[row][None] for key, piece in pieces.items()} if count else {}
            for row, count in enumerate(images_per_row)
        ]

    def join_images(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A row without images is one of empty images, as the processor makes it: rows stay in step with the ids."""
        shown = [row for row in rows if row]
        if not shown:
            return {}
        most = max(row["pixel_values"].shape[1] for row in shown)

        def padded(row: Mapping[str, Tensor], key: str) -> Tensor:
            like = shown[0][key]
            whole = like.new_zeros(len(row[key]) if row else 1, most, *like.shape[2:])
            if row:
                whole[:, : row[key].shape[1]] = row[key]
            return whole

        return {key: torch.cat([padded(row, key) for row in rows]) for key in self.image_keys}

    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        images = self.image_inputs(images)
        if not images:
            return []
        return self._as_embeddings(model, list(self.core(model).get_image_features(**images).pooler_output))

    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        return [TokenGrid(0, side, side)] * self.count_images(images)

    def vllm_frame(self, tokenizer: Any) -> ImageFrame:
        ids = self.placeholder_ids(tokenizer)
        return ImageFrame(ids["frame"], ids["frame"], (ids["whole"],))

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
        from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
        from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

        config = SmolVLMConfig(
            text_config=text_config(spec, tokenizer, model_type="llama", rope_parameters=rope()),
            vision_config={
                "hidden_size": spec.vision_hidden,
                "intermediate_size": 2 * spec.vision_hidden,
                "num_hidden_layers": spec.vision_depth,
                "num_attention_heads": spec.vision_heads,
                "image_size": spec.tile,
                "patch_size": spec.patch,
                "initializer_range": spec.init_std,
            },
            scale_factor=spec.merge,
            image_token_id=tokenizer.image_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=spec.tie,
        )
        edge = {"longest_edge": spec.tile}
        processor = SmolVLMProcessor(
            image_processor=SmolVLMImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False, **MEAN_STD),
            video_processor=SmolVLMVideoProcessor(size=edge, max_image_size=edge, **MEAN_STD),
            tokenizer=tokenizer,
            image_seq_len=(spec.tile // spec.patch // spec.merge) ** 2,
            chat_template=tokenizer.chat_template,
        )
        return SmolVLMForConditionalGeneration(config), processor


def _real(images: Mapping[str, Tensor]) -> Tensor:
    """[rows, images] bool, images that are no padding."""
    return images["pixel_attention_mask"].flatten(2).any(-1)


@contextmanager
def installed(folder: Path) -> Any:
    """The family as another package installs it: `folder` on the path, with that package's metadata."""
    install(folder, "smolvlm_family", registry.KIND.group, "smolvlm = smolvlm:SmolVLM")
    before = dict(registry._FAMILIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            yield
        finally:
            registry._FAMILIES.clear()
            registry._FAMILIES.update(before)
