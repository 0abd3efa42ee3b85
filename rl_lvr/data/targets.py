"""Oracle vectors of a batch: the vision encoder's embedding of each latent's region (papers C and LVR)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rl_lvr.data.encoding import TargetBatch
from rl_lvr.models import Family


def feature_offsets(features: list[Tensor], device: torch.device) -> Tensor:
    """[images], where each image's tokens start in the concatenation of all."""
    return torch.tensor([0, *[len(f) for f in features]], device=device).cumsum(0)[:-1]


@torch.no_grad()
def target_vectors(
    family: Family, model: nn.Module, image_inputs: dict[str, Tensor], targets: TargetBatch
) -> tuple[Tensor, Tensor]:
    """Target vectors [L, H] of a batch, and their token indices [L, G] in the concatenated image features (-1: none).

    A latent's vector is the mean of its token group. Auxiliary images come behind the prompt's, in one call of the
    vision tower: under ZeRO-3 all processes must call it equally often.
    """
    features = family.image_features(model, family.join_images([image_inputs, targets.aux_images]))
    flat = torch.cat(features)
    offsets = feature_offsets(features, flat.device)
    kept = targets.tokens >= 0
    index = torch.where(kept, targets.tokens + offsets[targets.images][:, None], -1)
    picked = flat[index.clamp_min(0)] * kept[..., None]
    return picked.sum(1) / kept.sum(1, keepdim=True), index
