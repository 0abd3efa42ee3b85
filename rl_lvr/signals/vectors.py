"""Signals of the latent vectors themselves: their length, and how close they are to image tokens and to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rl_lvr.signals.declaring import Needs, signal
from rl_lvr.signals.forward import Forward, Space
from rl_lvr.signals.values import Values


def _of_space(parameters: Mapping[str, Any]) -> Needs:
    return Needs(inputs=parameters["space"] == "input")


@signal(_of_space)
def latent_norm(f: Forward, *, space: Space = "input") -> Values:
    """Mean Euclidean length of the latents: as fed (`input`), or of the hidden states at their positions.

    Fed states lie in another range of norms than token embeddings (GAP, 2605.12374). The count is their number.
    """
    latent = f.regions.spans.latent
    rows = latent.flatten().nonzero()[:, 0]
    return f.per_sequence(_wide(f.vectors(space, latent)).norm(dim=-1), rows)


@signal(_of_space)
def latent_image_cosine(f: Forward, *, space: Space = "input", reduce: Literal["max", "mean"] = "max") -> Values:
    """Cosine between latents and image tokens: of the nearest token (`max`) or of all, mean over the latents.

    What visual memory predicts is a slot near image tokens (paper D, 2606.01287). `input` compares what entered the
    first layer, `hidden` the final hidden states, which paper A aligns. The count is the number of latents; 0 without
    an image.
    """
    values, counts = [], []
    for latents, images in zip(_each(f, space, f.regions.spans.latent), _each(f, space, f.regions.image), strict=True):
        both = len(latents) and len(images)
        cosine = latents @ images.T
        mean = (cosine.amax(1) if reduce == "max" else cosine.mean(1)).mean() if both else latents.new_zeros(())
        values.append(mean)
        counts.append(len(latents) if both else 0)
    return _values(values, counts)


@signal(_of_space)
def latent_span_cosine(f: Forward, *, space: Space = "input") -> Values:
    """Mean cosine between different latents of one sequence; near 1 its latents are one vector, repeated.

    Paper C's collapse is another figure, between samples: `collapse.py`. The count is the number of pairs; 0 with fewer
    than two latents.
    """
    values, counts = [], []
    for latents in _each(f, space, f.regions.spans.latent):
        n = len(latents)
        pairs = n * (n - 1) // 2
        values.append(torch.triu(latents @ latents.T, diagonal=1).sum().double() / max(pairs, 1))
        counts.append(pairs)
    return _values(values, counts)


def _values(values: Sequence[Tensor], counts: Sequence[int]) -> Values:
    return Values(torch.stack(list(values)), torch.tensor(counts, device=values[0].device))


def _each(f: Forward, space: Space, mask: Tensor) -> list[Tensor]:
    """Unit vectors [n, H] of each sequence at `mask` [B, T]."""
    vectors = normalize(_wide(f.vectors(space, mask)), dim=-1)
    sequence = f.regions.sequences[mask].to(vectors.device)
    return [vectors[sequence == number] for number in range(f.count)]


def _wide(vectors: Tensor) -> Tensor:
    """In fp32, or in float64 as they are."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()
