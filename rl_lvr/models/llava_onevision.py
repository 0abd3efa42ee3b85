"""LLaVA-OneVision: a base view of the whole image, then tiles of it if the image is alone in its row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lvr.models.base import Family, TokenGrid
from rl_lvr.models.tiny import MEAN_STD, TinySpec, rope, text_config
from rl_lvr.wrapping import gathered

TOWER = re.compile(r"(?<![\w])vision_tower\.(?!vision_model\.)")


class LlavaOnevision(Family):
    """LLaVA-OneVision.

    `batch_num_images` holds the number of images per row with images. A single image is resized to the base
    view whatever its shape, and cut into tiles; several in one row are padded to squares and get no tiles.
    """

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    image_keys = ("pixel_values", "image_sizes", "batch_num_images")
    vllm_classes: ClassVar = {
        "LlavaOnevisionForConditionalGeneration": (
            "vllm.model_executor.models.llava_onevision.LlavaOnevisionForConditionalGeneration"
        )
    }
    vllm_single_picture = True  # vLLM cuts every image into tiles, transformers only one that is alone in its row
    tiny_tokens: ClassVar = {"image_token": "<image>", "video_token": "<video>"}
    tiny_image = "<image>"

    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        return {"image": int(self.config.image_token_id), "video": int(self.config.video_token_id)}

    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        core = self.core(model)
        return {"tower": [core.vision_tower], "merger": [core.multi_modal_projector]}

    def vision_parameters(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """With the newline vector between rows of tiles, which belongs to no module of its own."""
        parameters = super().vision_parameters(model)
        parameters["merger"].append(self.core(model).image_newline)
        return parameters

    def image_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        images = super().image_inputs(batch)
        if images and "batch_num_images" not in images:  # what the forward takes a missing one for
            images["batch_num_images"] = torch.ones(len(images["image_sizes"]), dtype=torch.long)
        return images

    def complete_images(self, images: dict[str, Tensor], images_per_row: Sequence[int]) -> dict[str, Tensor]:
        if "pixel_values" not in images:
            return images
        counts = [count for count in images_per_row if count]
        return images | {"batch_num_images": torch.tensor(counts, device=images["pixel_values"].device)}

    def released_name(self, name: str) -> str:
        """With a level of SigLIP's names that transformers 5 has dropped."""
        return TOWER.sub(r"\g<0>vision_model.", name)

    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """`batch_num_images` counts rows of the batch, not images: `split_images` deals with it."""
        ones = [1] * len(images["image_sizes"])
        return {"pixel_values": ones, "image_sizes": ones}

    def split_images(self, images: Mapping[str, Any], images_per_row: Sequence[int]) -> list[dict[str, Tensor]]:
        images = self.image_inputs(images)
        rows = super().split_images(images, images_per_row)
        groups = iter(images["batch_num_images"].tolist() if images else [])
        for row, count in zip(rows, images_per_row, strict=True):
            own: list[int] = []
            while sum(own) < count:
                own.append(next(groups))
            if sum(own) != count:
                raise ValueError(f"a row of {count} images was processed in groups of {own} images.")
            if own:
                row["batch_num_images"] = torch.tensor(own, device=images["batch_num_images"].device)
        return rows

    def join_images(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Rows from different batches may be padded to different numbers of tiles."""
        rows = [row for row in rows if row]
        tiles = max((row["pixel_values"].shape[1] for row in rows), default=0)
        padded = []
        for row in rows:
            pixels = row["pixel_values"]
            missing = tiles - pixels.shape[1]
            padded.append({**row, "pixel_values": F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))})
        return super().join_images(padded)

    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        images = self.image_inputs(images)
        if not images:
            return []
        core = self.core(model)
        with gathered(core.image_newline):  # it belongs to the core, whose own forward does not run here
            features = core.get_image_features(**images).pooler_output
        return self._as_embeddings(model, features)

    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        """The base view, which comes first. In a row of several images it is the image padded to a square."""
        images = self.image_inputs(images)
        if not images:
            return []
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        alone = [n == 1 for n in images["batch_num_images"].tolist() for _ in range(n)]
        grids = []
        for single, (height, width) in zip(alone, images["image_sizes"].tolist(), strict=True):
            if single:
                grids.append(TokenGrid(0, side, side))
                continue
            edge = max(height, width)
            left, top = (edge - width) // 2 / edge, (edge - height) // 2 / edge
            grids.append(TokenGrid(0, side, side, (left, top, left + width / edge, top + height / edge)))
        return grids

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        side = spec.tile
        tile = {"height": side, "width": side}
        pinpoints = [[rows * side, cols * side] for rows in (1, 2) for cols in (1, 2)]
        config = LlavaOnevisionConfig(
            text_config=text_config(spec, tokenizer, model_type="qwen2", rope_parameters=rope()),
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": spec.vision_hidden,
                "intermediate_size": 2 * spec.vision_hidden,
                "num_hidden_layers": spec.vision_depth,
                "num_attention_heads": spec.vision_heads,
                "image_size": side,
                "patch_size": spec.patch,
                "vision_use_head": False,
            },
            image_token_index=tokenizer.image_token_id,
            video_token_index=tokenizer.video_token_id,
            image_grid_pinpoints=pinpoints,
            tie_word_embeddings=spec.tie,
        )
        processor = LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=tile, image_grid_pinpoints=pinpoints, **MEAN_STD),
            video_processor=LlavaOnevisionVideoProcessor(size=tile, **MEAN_STD),
            tokenizer=tokenizer,
            num_image_tokens=(side // spec.patch) ** 2,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            vision_aspect_ratio=config.vision_aspect_ratio,
            chat_template=tokenizer.chat_template,
        )
        return LlavaOnevisionForConditionalGeneration(config), processor
