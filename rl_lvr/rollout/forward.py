"""What a generating and a replaying forward share: the model's mode and the images of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rl_lvr.latents.inject import input_embeddings
from rl_lvr.models import Family


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
