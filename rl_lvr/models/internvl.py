"""InternVL (transformers' `internvl`, not the remote-code checkpoints): square tiles and a thumbnail."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import Family, TokenGrid


class InternVL(Family):
    """InternVL. `num_patches` counts the tiles of each image; the forward takes and ignores it."""

    name = "InternVL"
    model_types = ("internvl",)
    image_keys = ("pixel_values", "num_patches")

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
