"""Where queries look in an image: attention on every image token, and the cell of the image that each token shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rl_lvr.forward.batch import ReplayBatch, evaluating, forward_hidden
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import Family, TokenGrid, family_of
from rl_lvr.signals.probe import Probe, Reading
from rl_lvr.signals.regions import Queries, find_regions


@dataclass(frozen=True)
class ImageMap:
    """Attention of the Q queries of one rollout on its M image tokens. Places count the rollout's own tokens from 0,
    padding left out.
    """

    weights: Tensor
    """fp32 [Q, M]; with `by_layer` [L, Q, M], with `by_head` [H, Q, M], with both [L, H, Q, M]. A row sums to the
    attention on all images, and not to 1."""
    queries: Tensor
    """[Q] int64, places of the queries."""
    tokens: Tensor
    """[M] int64, places of the image tokens."""
    images: Tensor
    """[M] int64, the image of the rollout, from 0, that a token belongs to."""
    cells: Tensor
    """[M, 2] int64, row and column of a token in its image's grid. -1 for a token outside it: a tile that shows a part
    of the image, or a separator."""
    grids: tuple[TokenGrid, ...]
    """Per image the tokens that show it whole, row by row."""

    def drawn(self, image: int = 0) -> Tensor:
        """The weights on one image as a picture, [..., Q, rows, cols]."""
        grid = self.grids[image]
        first = int((self.images == image).nonzero()[0]) + grid.offset
        return self.weights[..., first : first + grid.rows * grid.cols].unflatten(-1, (grid.rows, grid.cols))


def image_map(
    model: nn.Module,
    batch: ReplayBatch,
    markers: FormatIds,
    *,
    queries: Queries | Tensor = "after",
    layers: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
    by_layer: bool = False,
    by_head: bool = False,
    feed: bool = True,
    recompute: bool = False,
    backend: str = "auto",
    run: Callable[[], Tensor] | None = None,
) -> list[ImageMap]:
    """Return the map of every rollout of `batch`, from one forward pass in evaluation mode. Without gradient.

    Args:
        model: The model, wrapped or not.
        batch: Recorded rollouts.
        markers: The latent format in the model's vocabulary.
        queries: A query set, or [B, T] bool, any real tokens of the batch.
        layers: Text layers, negative from the end; None for all.
        heads: Query heads; None for all.
        by_layer: Return one map per layer instead of their mean.
        by_head: Return one map per head instead of their mean.
        feed: False leaves SLOT's own embeddings where the latents belong.
        recompute: The probe computes the softmax's denominator anew.
        backend: Of the fused operations.
        run: Does the pass itself, as for `measure`.

    Raises:
        ValueError: If the batch's image tokens are not those of its images, or a query is padding.
        UserError: If no token of an image shows it whole (`Family.token_grid`).
    """
    family = family_of(model)
    regions = find_regions(batch.ids, batch.mask, batch.completion, markers, family.image_token)
    rows = queries if isinstance(queries, Tensor) else regions.queries(queries)
    if rows.shape != regions.completion.shape or bool((rows & (regions.sequences < 0)).any()):
        raise ValueError(f"queries {tuple(rows.shape)} are not real tokens of a batch {tuple(batch.ids.shape)}.")
    reading = Reading("image_map", layers, heads, by_layer, by_head)
    with torch.no_grad(), evaluating(model):
        with Probe(model, regions, rows, [reading], recompute=recompute, backend=backend) as probe:
            _ = forward_hidden(model, batch, markers, feed=feed) if run is None else run()
        sizes = _tokens_per_image(family, model, batch, regions.image)
    found = probe[reading]
    grids = family.token_grid(batch.images) if sizes else []
    # Per image token of the batch, row by row: the image, and the token's number in it.
    of_image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    inside = torch.cat([torch.arange(size) for size in sizes]) if sizes else of_image
    cells = torch.stack([_cells(inside, grids, of_image, axis) for axis in ("row", "col")], -1)
    places = batch.mask.long().cumsum(1).cpu() - 1
    image, asked = regions.image.cpu(), rows.cpu()
    maps, start, first = [], 0, 0
    for b in range(len(batch.ids)):
        here = slice(start, start + int(image[b].sum()))
        start = here.stop
        count = int(asked[b].sum())
        mine = of_image[here]
        numbers = mine - (mine[0] if len(mine) else 0)
        maps.append(
            ImageMap(
                weights=found[first : first + count, ..., : len(mine)].movedim(0, -2),
                queries=places[b][asked[b]],
                tokens=places[b][image[b]],
                images=numbers,
                cells=cells[here],
                grids=tuple(grids[int(mine[0]) : int(mine[-1]) + 1]) if len(mine) else (),
            )
        )
        first += count
    return maps


def _cells(inside: Tensor, grids: list[TokenGrid], of_image: Tensor, axis: str) -> Tensor:
    """[M], the row or column of tokens that have the number `inside` [M] in their image; -1 outside the grid."""
    offset, rows, cols = (
        torch.tensor([getattr(grid, name) for grid in grids], dtype=torch.long)[of_image]
        for name in ("offset", "rows", "cols")
    )
    number = inside - offset
    value = number // cols.clamp_min(1) if axis == "row" else number % cols.clamp_min(1)
    return torch.where((number >= 0) & (number < rows * cols), value, -1)


def _tokens_per_image(family: Family, model: nn.Module, batch: ReplayBatch, image: Tensor) -> list[int]:
    """How many tokens each image of the batch has; `image` [B, T] bool marks them all."""
    total = family.count_images(batch.images) if batch.images else 0
    begins = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    runs = torch.bincount(begins.flatten().cumsum(0)[image.flatten()])[1:].tolist()
    # Some processors write nothing between two images, and others separators within one: then the features tell.
    sizes = runs if len(runs) == total else [len(part) for part in family.image_features(model, batch.images)]
    if sum(sizes) != int(image.sum()):
        raise ValueError(f"{int(image.sum())} image tokens in the batch, but its {total} images have {sum(sizes)}.")
    return sizes
