"""Put latents into the input embeddings of a model, for one forward pass.

The output of the input-embedding module is edited by a scoped hook. So the model looks its tokens up as always:
image features, M-RoPE positions, PEFT, gradient checkpointing and ZeRO-3 (which gathers a module's weights
around its own call) all stay as they are, and no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import FormatIds
from rl_lvr.wrapping import input_embeddings


@contextmanager
def inject(model: nn.Module, latents: LatentBatch, markers: FormatIds | None = None) -> Iterator[None]:
    """Replace the embeddings at `latents.positions` in the one forward pass that runs inside this context.

    `model` may be wrapped (DDP, DeepSpeed, PEFT); positions count in the padded `input_ids` of that forward.
    Gradients flow to `latents.values` if they require them. With `markers`, every position must hold a token that
    the format allows a latent at: this catches carriers that were shifted or shuffled against their token ids.

    Raises RuntimeError if the forward never looked its tokens up (`inputs_embeds` was given), or did so twice.
    """
    calls = 0

    def overlay(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("one injection serves one forward pass: the embeddings were looked up a second time.")
        ids = args[0] if args else kwargs["input"]
        return _overlay(output, ids, latents, markers)

    handle = input_embeddings(model).register_forward_hook(overlay, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(
            "the latents were not fed: the forward pass never looked up its input embeddings. "
            "Pass input_ids, not inputs_embeds; under torch.compile, compile the layers and not the whole model."
        )


def _overlay(embeds: Tensor, ids: Tensor, latents: LatentBatch, markers: FormatIds | None) -> Tensor:
    """`embeds` [B, T, H] with the latents written over it, out of place so that autograd sees both."""
    if ids.ndim != 2 or ids.shape[0] != len(latents):
        raise ValueError(f"latents of {len(latents)} rows cannot enter token ids of shape {tuple(ids.shape)}.")
    if latents.hidden_size != embeds.shape[-1]:
        raise ValueError(f"latents of width {latents.hidden_size} cannot enter embeddings of width {embeds.shape[-1]}.")
    rows, columns = latents.mask.nonzero(as_tuple=True)
    if not len(rows):
        return embeds
    rows, columns = rows.to(embeds.device), columns.to(embeds.device)
    places = latents.positions.to(embeds.device)[rows, columns]
    if int(places.max()) >= ids.shape[1]:
        raise ValueError(f"a latent sits at position {int(places.max())} of a row of {ids.shape[1]} tokens.")
    if markers is not None:
        _check_places(ids[rows, places], rows, places, markers)
    values = latents.values.to(embeds.device)[rows, columns].to(embeds.dtype)
    return embeds.index_put((rows, places), values)


def _check_places(tokens: Tensor, rows: Tensor, places: Tensor, markers: FormatIds) -> None:
    allowed = tokens == markers.slot
    if markers.format.first == "before_start":
        allowed |= tokens == markers.start
    if not bool(allowed.all()):
        at = int(torch.nonzero(~allowed)[0])
        raise ValueError(
            f"row {int(rows[at])}, position {int(places[at])} holds token {int(tokens[at])}, which takes no latent: "
            "the latents and the token ids do not belong together."
        )
