"""Pointer puzzles: pictures on which latents can carry the answer, with a record of the true path.

A grid of cells; the left half of a cell is its own colour, the right half the colour of the cell to visit
next. The pointers form one cycle through all cells. The text names a start colour and a number of hops; the
answer is the colour reached. Why one cycle: a random permutation returns to its start early, and then "answer
the start" is a shortcut. Files on disk are puzzle_sets.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from rl_lvr.data.images import ImageRef, encode_png
from rl_lvr.data.record import LatentSpec, Record
from rl_lvr.data.schema import LATENT
from rl_lvr.errors import UserError

PALETTE: dict[str, tuple[int, int, int]] = {
    # A grid of n cells uses the first n. The first 9 are the corners of the RGB cube and its middle, so that no channel
    # tells less than another; the first 12 lie at least 127 apart, all 24 at least 67.
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "orange": (255, 128, 0),
    "purple": (128, 0, 255),
    "forest": (0, 128, 0),
    "brown": (120, 60, 30),
    "pink": (255, 165, 190),
    "lime": (128, 255, 0),
    "teal": (0, 128, 128),
    "navy": (0, 0, 128),
    "olive": (128, 128, 0),
    "maroon": (128, 0, 64),
    "lavender": (180, 150, 255),
    "mint": (150, 255, 190),
    "beige": (255, 225, 160),
    "azure": (60, 150, 240),
    "crimson": (220, 20, 90),
}
COLOURS = tuple(PALETTE)
_RGB = np.array(list(PALETTE.values()), dtype=np.uint8)

SPLITS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5), "val": (6,), "test": (7,)}
"""Which eighths of all pictures belong to a split."""

LATENTS = ("path", "decorative", "none")
_BATCH = 4096
_DRY_BATCHES = 64  # so many batches without a new puzzle, and the split is taken to be used up


@dataclass(frozen=True)
class PuzzleConfig:
    """What puzzles to draw. The same config and seed always give the same puzzles."""

    rows: int = 3
    cols: int = 4
    hops: int = 6
    cell_px: int = 8
    seed: int = 0
    latents: Literal["path", "decorative", "none"] = "path"
    """`path`: one latent per hop, its target the cell visited at hop 0 .. hops - 1. `decorative`: k latents
    whose target is always cell 0, which says nothing about the answer. `none`: the answer alone."""
    k: int | None = None
    """Latents of a decorative span (default: as many as hops). A path has one per hop."""

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "hops", "cell_px"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"puzzle {name} is {value!r}: give a whole number above 0.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"puzzle seed is {self.seed!r}: give a whole number from 0.")
        if not 3 <= self.cells <= len(COLOURS):
            raise UserError(
                f"a grid of {self.rows} x {self.cols} has {self.cells} cells: choose from 3 to "
                f"{len(COLOURS)}, one colour each."
            )
        if self.hops >= self.cells:
            raise UserError(
                f"{self.hops} hops over a cycle of {self.cells} cells come back to the start: "
                f"choose at most {self.cells - 1} hops, or a larger grid."
            )
        if self.cell_px % 2:
            raise UserError(f"puzzle cell_px is {self.cell_px}: a cell has two halves, give an even number.")
        if self.latents not in LATENTS:
            raise UserError(f"puzzle latents is {self.latents!r}: choose from {', '.join(LATENTS)}.")
        if self.k is not None and self.latents != "decorative":
            raise UserError(f"puzzle k goes with decorative latents only, not with {self.latents!r}: leave it out.")
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise UserError(f"puzzle k is {self.k!r}: give a whole number above 0.")

    @property
    def cells(self) -> int:
        return self.rows * self.cols

    @property
    def span_length(self) -> int:
        """Latents in the span of one record (0 for `none`)."""
        return {"path": self.hops, "decorative": self.k or self.hops, "none": 0}[self.latents]

    @property
    def colours(self) -> tuple[str, ...]:
        return COLOURS[: self.cells]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that the texts of these puzzles use, for a tokenizer built from scratch."""
        return (*self.colours, "from", "hops", *(str(n) for n in range(1, self.cells)))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Puzzles(NamedTuple):
    """Puzzles as arrays. Colours are numbers: positions in COLOURS."""

    own: np.ndarray
    """N, cells: the colour of each cell."""
    cycle: np.ndarray
    """N, cells: the colours in the cycle's order from the start on; position h is the colour at hop h."""

    def __len__(self) -> int:  # NamedTuple's own would say 2
        return len(self.own)

    @property
    def where(self) -> np.ndarray:
        """N, cells: the cell of each colour."""
        return np.argsort(self.own, axis=1)

    @property
    def pointer(self) -> np.ndarray:
        """N, cells: the colour that each colour points to."""
        pointer = np.empty_like(self.cycle)
        np.put_along_axis(pointer, self.cycle, np.roll(self.cycle, -1, axis=1), axis=1)
        return pointer

    @property
    def shown(self) -> np.ndarray:
        """N, cells: the colour in the right half of each cell."""
        return np.take_along_axis(self.pointer, self.own, axis=1)


def chance(config: PuzzleConfig) -> float:
    """Best accuracy of a solver that knows the rules and sees all colours, but reads no pointer.

    With one cycle through n cells and 0 < hops < n the answer is never the start. Without the pointers every
    cycle is equally likely, and by symmetry so is each of the other n - 1 colours: the best it can do is
    1 / (n - 1). (Who reads pointers but chains none can also rule out the colour after the start and the one
    before it, if 1 < hops < n - 1: that is 1 / (n - 3). docs/data.md says what it means for a judgement.)
    """
    return 1 / (config.cells - 1)


def _permutations(bits: np.random.PCG64, count: int, n: int) -> np.ndarray:
    """Uniform permutations. From raw bits: numpy keeps those stable for ever, not Generator's methods."""
    keys = bits.random_raw(count * n).reshape(count, n)
    return np.argsort(keys, axis=1, kind="stable").astype(np.uint8)


def _eighth(puzzles: Puzzles) -> np.ndarray:
    """N: a number from 0 to 7 that depends on the picture alone, not on seed, hops or start. FNV-1a."""
    digest = np.full(len(puzzles), 0xCBF29CE484222325, dtype=np.uint64)
    for column in np.concatenate([puzzles.own, puzzles.shown], axis=1).T:
        digest = (digest ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
    digest ^= digest >> np.uint64(33)  # FNV's top bits move little with the last bytes: mix once (murmur3's end)
    digest *= np.uint64(0xFF51AFD7ED558CCD)
    digest ^= digest >> np.uint64(33)
    return (digest >> np.uint64(61)).astype(np.int64)


def draw(config: PuzzleConfig, n: int, split: str) -> Puzzles:
    """`n` different puzzles of a split. A smaller `n` gives the first of a larger one.

    A picture belongs to one split, whatever the seed, the hops and the start: so train and test share no
    picture, even between sets that were made with different settings.
    """
    if split not in SPLITS:
        raise UserError(f"puzzle split {split!r} is unknown: choose from {', '.join(SPLITS)}.")
    if n < 0:
        raise UserError(f"the number of puzzles is {n}: give 0 or more.")
    bits = np.random.PCG64(np.random.SeedSequence([config.seed, list(SPLITS).index(split)]))
    own = np.empty((n, config.cells), np.uint8)
    cycle = np.empty((n, config.cells), np.uint8)
    seen: set[bytes] = set()
    dry = 0
    while len(seen) < n:
        batch = Puzzles(_permutations(bits, _BATCH, config.cells), _permutations(bits, _BATCH, config.cells))
        before = len(seen)
        for i in np.flatnonzero(np.isin(_eighth(batch), SPLITS[split])):
            key = batch.own[i].tobytes() + batch.cycle[i].tobytes()
            if key in seen:
                continue
            own[len(seen)], cycle[len(seen)] = batch.own[i], batch.cycle[i]
            seen.add(key)
            if len(seen) == n:
                break
        dry = dry + 1 if len(seen) == before else 0
        if dry == _DRY_BATCHES:
            raise UserError(
                f"a grid of {config.rows} x {config.cols} has only {before} different puzzles for {split}, "
                f"not {n}: ask for fewer, or choose a larger grid."
            )
    return Puzzles(own, cycle)


def render(config: PuzzleConfig, puzzles: Puzzles) -> np.ndarray:
    """N, rows * cell_px, cols * cell_px, 3: the pictures, as bytes."""
    half = config.cell_px // 2
    halves = _RGB[np.stack([puzzles.own, puzzles.shown], axis=-1)]  # N, cells, 2, 3
    halves = halves.reshape(-1, config.rows, 1, config.cols * 2, 1, 3)
    shape = (len(puzzles), config.rows, config.cell_px, config.cols * 2, half, 3)
    return np.broadcast_to(halves, shape).reshape(-1, config.rows * config.cell_px, config.cols * config.cell_px, 3)


def question(config: PuzzleConfig, start: str) -> str:
    return f"from {start} {config.hops} hops"


def iterate(config: PuzzleConfig, n: int, split: str) -> Iterator[Record]:
    """The records of `draw(config, n, split)`, one at a time; images are embedded PNG bytes."""
    puzzles = draw(config, n, split)
    for begin in range(0, n, _BATCH):
        part = Puzzles(*(array[begin : begin + _BATCH] for array in puzzles))
        pictures, visited = (
            render(config, part),
            np.take_along_axis(part.where, part.cycle.astype(np.int64), axis=1),
        )
        for i in range(len(part)):
            yield _record(config, f"{split}-{begin + i:06d}", part.cycle[i].tolist(), visited[i].tolist(), pictures[i])


def generate(config: PuzzleConfig, n: int, split: str) -> list[Record]:
    """`n` different puzzles of a split as records."""
    return list(iterate(config, n, split))


def _record(config: PuzzleConfig, name: str, cycle: list[int], visited: list[int], picture: np.ndarray) -> Record:
    """`visited` are the cells of `cycle`'s colours, in its order."""
    colours = [COLOURS[c] for c in cycle]
    answer = colours[config.hops]
    cells = {"path": visited[: config.hops], "decorative": [0] * config.span_length, "none": []}[config.latents]
    latents = (LatentSpec(image=0, cells=tuple(cells), grid=(config.rows, config.cols)),) if cells else ()
    text = [{"type": "image"}, {"type": "text", "text": question(config, colours[0])}]
    reply = [{"type": "text", "text": (LATENT if latents else "") + answer}]
    return Record(
        id=name,
        messages=({"role": "user", "content": text}, {"role": "assistant", "content": reply}),
        images=(ImageRef(f"{name}.png", data=encode_png(Image.fromarray(picture))),),
        answer=answer,
        latents=latents or None,
        category=f"hops-{config.hops}",
        meta={
            "start": colours[0],
            "hops": config.hops,
            "path": colours[: config.hops + 1],
            "cells": visited[: config.hops + 1],
            "cycle": colours,
        },
    )
