"""Qwen2.5-VL and Qwen3-VL: images of any size, M-RoPE with three positions per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, Positions, TokenGrid

MERGERS = ("merger", "deepstack_merger_list")


class Qwen2_5VL(Family):  # noqa: N801 - the model's own name
    """Qwen2.5-VL."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    image_keys = ("pixel_values", "image_grid_thw")

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


class Qwen3VL(Qwen2_5VL):
    """Qwen3-VL."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl",)
