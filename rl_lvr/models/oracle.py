"""Oracle vectors: what a latent should hold, taken from the image region that the answer depends on.

Boxes are x0, y0, x1, y1 as fractions of the image's width and height. Everything here is without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.models.base import TokenGrid
from rl_lvr.models.registry import family_of

Box = Sequence[float]

WHOLE: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
ROUNDING = 1e-6  # a cell that is covered by half but for rounding counts


def groups_of(n: int, k: int) -> list[range]:
    """k nearly equal runs that cover 0 .. n - 1 in order; with n < k single items, each repeated in place."""
    if n < 1 or k < 1:
        raise ValueError(f"{n} tokens cannot be reduced to {k} vectors.")
    return [range(j * n // k, max((j + 1) * n // k, j * n // k + 1)) for j in range(k)]


@torch.no_grad()
def group_mean(tokens: Tensor, k: int) -> Tensor:
    """`tokens` [n, H] -> [k, H], the means of k nearly equal runs of neighbours.

    All tokens take part. LanteRn drops the n mod k last ones instead, which blinds the target to a strip of
    the region.
    """
    return torch.stack([tokens[run.start : run.stop].mean(0) for run in groups_of(len(tokens), k)])


def tokens_in_box(grid: TokenGrid, box: Box) -> Tensor:
    """Indices [n] of the tokens that the box covers by half or more; if none, the one under its centre."""
    x0, y0, x1, y1 = check_box(box)
    left, top, right, bottom = grid.area
    # From the image to cells: the image may fill only a part of the grid.
    xs = [(left + x * (right - left)) * grid.cols for x in (x0, x1)]
    ys = [(top + y * (bottom - top)) * grid.rows for y in (y0, y1)]
    wide = _overlap(xs[0], xs[1], grid.cols)
    high = _overlap(ys[0], ys[1], grid.rows)
    inside = (high[:, None] * wide[None, :]).flatten() >= 0.5 - ROUNDING
    if not bool(inside.any()):
        col = min(math.floor(sum(xs) / 2), grid.cols - 1)
        row = min(math.floor(sum(ys) / 2), grid.rows - 1)
        return torch.tensor([grid.offset + row * grid.cols + col])
    return grid.offset + inside.nonzero()[:, 0]


def _overlap(low: float, high: float, cells: int) -> Tensor:
    """[cells]: how much of each unit cell lies between low and high."""
    edges = torch.arange(cells, dtype=torch.float64)
    return ((edges + 1).clamp(max=high) - edges.clamp(min=low)).clamp(min=0)


def check_box(box: Box) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(
            f"box {[x0, y0, x1, y1]} is no region of an image: "
            "it must be x0, y0, x1, y1 from 0 to 1 with x0 < x1 and y0 < y1."
        )
    return x0, y0, x1, y1


def latent_groups(grid: TokenGrid, boxes: Sequence[Box], k: int) -> tuple[tuple[int, ...], ...]:
    """For each of k latents the image tokens whose mean is its target.

    One box: its tokens in k runs. n boxes: k / n latents for each, in order.
    """
    if not boxes or k % len(boxes):
        raise UserError(
            f"a span of {k} latents cannot share {len(boxes)} boxes evenly: "
            "give one box, or a number of boxes that divides the number of latents."
        )
    share = k // len(boxes)
    groups = []
    for box in boxes:
        tokens = tokens_in_box(grid, box).tolist()
        groups += [tuple(tokens[i] for i in run) for run in groups_of(len(tokens), share)]
    return tuple(groups)


@torch.no_grad()
def box_oracle(features: Tensor, grid: TokenGrid, boxes: Sequence[Box], k: int) -> Tensor:
    """`features` [n, H] of one image and the boxes on it -> [k, H]."""
    groups = latent_groups(grid, boxes, k)
    return torch.stack([features[list(group)].mean(0) for group in groups]).detach()


def crop(image: Image.Image, box: Box) -> Image.Image:
    """The pixels under a box: every pixel that it touches."""
    return image.crop(crop_edges(box, *image.size))


def crop_edges(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop, in pixels."""
    x0, y0, x1, y1 = check_box(box)
    return (
        math.floor(x0 * width + ROUNDING),
        math.floor(y0 * height + ROUNDING),
        math.ceil(x1 * width - ROUNDING),
        math.ceil(y1 * height - ROUNDING),
    )


@torch.no_grad()
def crop_oracle(
    model: nn.Module, processor: Any, images: Sequence[Image.Image], boxes: Sequence[Box], k: int
) -> Tensor:
    """One box on each image -> [n, k, H]: the crops seen as images of their own, through tower and merger."""
    family = family_of(model)
    crops = [crop(image, box) for image, box in zip(images, boxes, strict=True)]
    inputs = family.image_inputs(processor.image_processor(images=crops, return_tensors="pt"))
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items()}
    features = family.image_features(model, inputs)
    grids = family.token_grid(inputs)
    return torch.stack([box_oracle(f, grid, [WHOLE], k) for f, grid in zip(features, grids, strict=True)])
