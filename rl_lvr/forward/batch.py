"""What forwards share: the model's mode, the images of a batch, the replay itself, the states of another's pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import Family, family_of
from rl_lvr.wrapping import input_embeddings, unwrapped


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


@contextmanager
def states_before(model: nn.Module, rows: Tensor, places: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the final hidden states [B, T, H] of the forward inside, and f of those before `places` [N] of `rows`.

    For a forward that is not ours to call, and whose head hides its states. The feedback map runs inside it, and its
    result is tied to it by a zero, so that DDP sees its parameters used and ZeRO-3 gathers them in order.
    """
    made: list[tuple[Tensor, Tensor]] = []
    has_map = hasattr(unwrapped(model), FEEDBACK)

    def collect(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        predicted = feedback(model, hidden[rows, places - 1])
        made.append((hidden, predicted))
        if has_map:
            output.last_hidden_state = hidden + 0.0 * predicted.sum()
        return output

    handle = family_of(model).core(model).register_forward_hook(collect)
    try:
        yield made
    finally:
        handle.remove()
