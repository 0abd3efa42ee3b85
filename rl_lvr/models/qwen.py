"""Qwen2.5-VL and Qwen3-VL: images of any size, M-RoPE with three positions per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, Positions, TokenGrid
from rl_lvr.models.tiny import MEAN_STD, TinySpec, rope, text_config

MERGERS = ("merger", "deepstack_merger_list")
TEMPORAL = 2
"""Frames in one patch. An image is repeated to fill it."""


class Qwen2_5VL(Family):  # noqa: N801 - the model's own name
    """Qwen2.5-VL."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    image_keys = ("pixel_values", "image_grid_thw")
    vllm_classes: ClassVar = {
        "Qwen2_5_VLForConditionalGeneration": "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VLForConditionalGeneration"
    }
    tiny_tokens: ClassVar = {
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "vision_pad_token": "<|vision_pad|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    tiny_image = "<|vision_start|><|image_pad|><|vision_end|>"

    def placeholder_ids(self, tokenizer: Any) -> dict[str, int]:
        names = ("image", "video", "vision_start", "vision_end")
        ids = {name: int(getattr(self.config, f"{name}_token_id")) for name in names}
        return ids | self._token_ids(tokenizer, {"vision_pad": "<|vision_pad|>"})

    def vision_parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        children = dict(self.core(model).visual.named_children())
        merger = [children.pop(name) for name in MERGERS if name in children]
        return {"tower": list(children.values()), "merger": merger}

    def rows_per_image(self, images: Mapping[str, Tensor]) -> dict[str, list[int]]:
        patches = images["image_grid_thw"].prod(-1).tolist()
        return {"pixel_values": patches, "image_grid_thw": [1] * len(patches)}

    def image_features(self, model: nn.Module, images: Mapping[str, Any]) -> list[Tensor]:
        """What enters at the bottom. Qwen3-VL's first layers add features of their own (DeepStack)."""
        images = self.image_inputs(images)
        if not images:
            return []
        return self._as_embeddings(model, self.core(model).get_image_features(**images).pooler_output)

    def token_grid(self, images: Mapping[str, Any]) -> list[TokenGrid]:
        images = self.image_inputs(images)
        if not images:
            return []
        merge = self.config.vision_config.spatial_merge_size
        grids = []
        for frames, rows, cols in images["image_grid_thw"].tolist():
            if frames != 1:
                raise UserError(f"an image has {frames} frames: a region of a video is not supported.")
            grids.append(TokenGrid(0, rows // merge, cols // merge))
        return grids

    def positions(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Mapping[str, Any] | None = None,
    ) -> Positions:
        """M-RoPE positions. The kind of each token (`mm_token_type_ids`) is read from the ids themselves."""
        if bool((input_ids == self.config.video_token_id).any()):
            raise UserError("the batch holds video tokens: only images are supported.")
        # transformers walks the rows in Python: on the CPU that costs no waiting for a GPU.
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        images = self.image_inputs(images or {})
        prefill, deltas = self.core(model).get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
            image_grid_thw=images["image_grid_thw"].cpu() if images else None,
            attention_mask=mask,
        )
        first_free = mask.sum(-1) + deltas[:, 0]
        return Positions(prefill.to(input_ids.device), first_free.to(input_ids.device))

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        half = spec.head_dim // 2  # rotary pairs, shared out as 1 : 1.5 : 1.5 over time, height and width
        section = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
        return _tiny(
            spec,
            tokenizer,
            (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
            text={"rope_parameters": rope(mrope_section=section)},
            vision={"window_size": 2 * spec.token_pixels, "fullatt_block_indexes": [spec.vision_depth - 1]},
        )


class Qwen3VL(Qwen2_5VL):
    """Qwen3-VL."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    vllm_classes: ClassVar = {
        "Qwen3VLForConditionalGeneration": "vllm.model_executor.models.qwen3_vl.Qwen3VLForConditionalGeneration"
    }

    @classmethod
    def tiny(cls, spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

        half = spec.head_dim // 2
        side = half * 20 // 64  # the shares of the released models: 24, 20, 20 of 64
        section = [half - 2 * side, side, side]
        return _tiny(
            spec,
            tokenizer,
            (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor),
            text={
                "head_dim": spec.head_dim,
                "rope_parameters": rope(mrope_section=section, mrope_interleaved=True),
            },
            vision={
                "num_position_embeddings": 256,
                "deepstack_visual_indexes": list(range(min(spec.vision_depth, spec.layers))),
            },
        )


def _tiny(
    spec: TinySpec,
    tokenizer: Any,
    classes: tuple[Any, Any, Any, Any],
    *,
    text: dict[str, Any],
    vision: dict[str, Any],
) -> tuple[Any, Any]:
    """Build a tiny model and its processor.

    Args:
        classes: Of config, model, processor and video processor.
        text: Settings of the text model that only one of the two families has.
        vision: The same of the vision tower.
    """
    from transformers import Qwen2VLImageProcessor

    config_class, model_class, processor_class, video_class = classes
    tokens = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    config = config_class(
        text_config=text_config(spec, tokenizer, **text),
        vision_config={
            "depth": spec.vision_depth,
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 2 * spec.vision_hidden,
            "num_heads": spec.vision_heads,
            "out_hidden_size": spec.hidden,
            "patch_size": spec.patch,
            "spatial_merge_size": spec.merge,
            "temporal_patch_size": TEMPORAL,
            "in_channels": 3,
            "initializer_range": spec.init_std,
            **vision,
        },
        tie_word_embeddings=spec.tie,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in tokens},
    )
    images = {
        "patch_size": spec.patch,
        "merge_size": spec.merge,
        "temporal_patch_size": TEMPORAL,
        "size": spec.pixel_limits,
        **MEAN_STD,
    }
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**images),
        video_processor=video_class(**images),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return model_class(config), processor
