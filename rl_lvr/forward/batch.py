"""What a generating and a replaying forward share: the model's mode, the images of a batch, and the replay itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import Family, family_of
from rl_lvr.rollout.types import Rollout, latent_batch
from rl_lvr.wrapping import input_embeddings


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Each module gets back its own mode: a frozen tower may differ from the rest."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def batch_images(family: Family, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Image inputs of rows joined into a batch's, on the model's device and in its precision."""
    weight: Any = input_embeddings(model).weight
    return {
        name: value.to(weight.device, weight.dtype) if value.is_floating_point() else value.to(weight.device)
        for name, value in family.join_images(rows).items()
    }


@dataclass(frozen=True)
class ReplayBatch:
    """Recorded rollouts as one padded batch, on the model's device. Padding may stand on either side."""

    ids: Tensor
    """[B, T] int64."""
    mask: Tensor
    """[B, T] int64, 1 at real tokens."""
    completion: Tensor
    """[B, T] bool, tokens of the completion."""
    latents: LatentBatch
    """Positions count in `ids`, padding included."""
    images: dict[str, Tensor]
    """The batch's image inputs, in the order of its rows; {} without images."""


def replay_batch(
    model: nn.Module, rollouts: Sequence[Rollout], images: Sequence[Mapping[str, Any]], *, side: str = "right"
) -> ReplayBatch:
    """Pad `rollouts`, whose images are `images` (one dict per row, {} for none), on `side`."""
    weight: Any = input_embeddings(model).weight
    rows = [torch.tensor(rollout.ids) for rollout in rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side).to(weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)[:, None]
    prompts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts], device=ids.device)[:, None]
    shift = ids.shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
    place = torch.arange(ids.shape[1], device=ids.device) - shift
    mask = (place >= 0) & (place < lengths)
    return ReplayBatch(
        ids=ids,
        mask=mask.long(),
        completion=mask & (place >= prompts),
        latents=latent_batch(rollouts).shifted(shift[:, 0].cpu()),
        images=batch_images(family_of(model), model, images),
    )


def forward_hidden(model: nn.Module, batch: ReplayBatch, markers: FormatIds, *, feed: bool = True) -> Tensor:
    """Hidden states after the final norm, [B, T, H]. `feed=False` leaves SLOT's own embeddings at the latents."""
    family = family_of(model)
    with inject(model, batch.latents, markers) if feed else nullcontext():
        output = family.core(model)(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=family.positions(model, batch.ids, batch.mask, batch.images).prefill,
            use_cache=False,
            **batch.images,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden
