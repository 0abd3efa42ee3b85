"""InternVL (transformers' `internvl`, not the remote-code checkpoints): square tiles and a thumbnail."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, ImageFrame, TokenGrid
from rl_lvr.models.tiny import MEAN_STD, TinySpec, rope, text_config


class InternVL(Family):
    """InternVL. `num_patches` counts the tiles of each image; the forward takes and ignores it."""

    name = "InternVL"
    model_types = ("internvl",)
    image_keys = ("pixel_values", "num_patches")
    vllm_classes: ClassVar = {
        "InternVLForConditionalGeneration": "vllm.model_executor.models.interns1.InternS1ForConditionalGeneration"
    }
    tiny_tokens: ClassVar = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tiny_image = "<IMG_CONTEXT>"

    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        names = {
            "vision_start": getattr(tokenizer, "start_image_token", None),
            "vision_end": getattr(tokenizer, "end_image_token", None),
            "video": getattr(tokenizer, "video_token", None),
        }
        return {"image": int(self.config.image_token_id)} | self._token_ids(tokenizer, names)

    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        core = self.core(model)
        return {"tower": [core.vision_tower], "merger": [core.multi_modal_projector]}

    def image_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """With the number of tiles per image, which the processor drops: counted in the token ids."""
        images = super().image_inputs(batch)
        if not images or "num_patches" in images:
            return images
        ids = batch.get("input_ids")
        if ids is None:
            raise UserError(
                "InternVL's pixel_values do not say which tiles belong to one image: "
                "take image inputs out of the processor's output with family.image_inputs(batch)."
            )
        rows = ids.tolist() if isinstance(ids, Tensor) else ids
        if rows and not isinstance(rows[0], list):
            rows = [rows]
        tokens = self.config.image_seq_length
        runs = [
            sum(1 for _ in run)
            for row in rows
            for is_image, run in itertools.groupby(row, lambda token: token == self.config.image_token_id)
            if is_image
        ]
        if any(run % tokens for run in runs) or sum(runs) != tokens * len(images["pixel_values"]):
            raise ValueError(
                f"{sum(runs)} image tokens do not fit {len(images['pixel_values'])} tiles of {tokens} each: "
                "input_ids and pixel_values do not belong together."
            )
        tiles = torch.tensor([run // tokens for run in runs], device=images["pixel_values"].device)
        return images | {"num_patches": tiles}

    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        tiles = images["num_patches"].tolist()
        return {"pixel_values": tiles, "num_patches": [1] * len(tiles)}

    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        images = self.image_inputs(images)
        if not images:
            return []
        tiles = self.core(model).get_image_features(pixel_values=images["pixel_values"]).pooler_output
        features = [image.flatten(0, 1) for image in tiles.split(images["num_patches"].tolist())]
        return self._as_embeddings(model, features)

    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        """The only tile, or the thumbnail, which the processor puts behind the others."""
        images = self.image_inputs(images)
        if not images:
            return []
        tokens = self.config.image_seq_length
        side = round(tokens**0.5)
        grids = []
        for tiles in images["num_patches"].tolist():
            if tiles == 2:
                # Two or more tiles come with a thumbnail, so three at least: this image was cut without one.
                raise UserError("an image has two tiles and no thumbnail: no tile shows the whole image.")
            grids.append(TokenGrid((tiles - 1) * tokens, side, side))
        return grids

    def vllm_frame(self, tokenizer: Any) -> ImageFrame:
        placeholders = self.placeholder_ids(tokenizer)
        return ImageFrame(placeholders["vision_start"], placeholders["vision_end"])

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import (
            GotOcr2ImageProcessor,
            InternVLConfig,
            InternVLForConditionalGeneration,
            InternVLProcessor,
            InternVLVideoProcessor,
        )

        tile = {"height": spec.tile, "width": spec.tile}
        tokens = (spec.tile // spec.patch // spec.merge) ** 2
        config = InternVLConfig(
            text_config=text_config(spec, tokenizer, model_type="qwen2", rope_parameters=rope()),
            vision_config={
                "hidden_size": spec.vision_hidden,
                "intermediate_size": 2 * spec.vision_hidden,
                "num_hidden_layers": spec.vision_depth,
                "num_attention_heads": spec.vision_heads,
                "image_size": [spec.tile, spec.tile],
                "patch_size": [spec.patch, spec.patch],
                "initializer_range": spec.init_std,
                "attention_bias": True,
                # The released models drop paths by a learned scale of 0.1; two shallow blocks should show.
                "layer_scale_init_value": 1.0,
            },
            image_token_id=tokenizer.context_image_token_id,
            image_seq_length=tokens,
            downsample_ratio=1 / spec.merge,
            tie_word_embeddings=spec.tie,
        )
        processor = InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=tile, crop_to_patches=True, max_patches=4, **MEAN_STD),
            video_processor=InternVLVideoProcessor(size=tile, **MEAN_STD),
            tokenizer=tokenizer,
            image_seq_length=tokens,
            chat_template=tokenizer.chat_template,
        )
        return InternVLForConditionalGeneration(config), processor
