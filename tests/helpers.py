"""Batches with images for the tiny models. pytest puts this folder on the path: `from helpers import ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
"""Model types of the families with images that rl_lvr brings."""
WORDS = ("red", "green", "blue", "yellow", "from", "hops", "what", "is", "next", "1", "2", "3")


def noise_image(seed: int, height: int = 56, width: int = 84) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def install(folder: Path, package: str, group: str, *entries: str) -> None:
    """Write the metadata of a package with entry points, as if it were installed in `folder`."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))


def make_batch(
    processor: Any,
    rows: Sequence[tuple[Sequence[Image.Image], str]],
    padding_side: str = "left",
    replies: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A padded batch: each row is (images, question); with `replies` the assistant's turn follows."""
    texts = []
    for index, (images, question) in enumerate(rows):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        texts.append(text + (replies[index] if replies else ""))
    # One list per row that has images: LLaVA-OneVision treats rows of several images differently.
    images = [list(row_images) for row_images, _ in rows if row_images]
    batch = processor(text=texts, images=images or None, padding=True, padding_side=padding_side, return_tensors="pt")
    return dict(batch)


# Rows of different lengths: none, one and two images, of different sizes.
MIXED_ROWS = (
    ([noise_image(0)], "from red 3 hops what is next"),
    ([], "what"),
    ([noise_image(1, 84, 56), noise_image(2, 56, 56)], "from blue 1 hops"),
)


def paper_b_masks(
    ids: Sequence[int], prompt: int, steps: int | None, start: int | None, end: int | None
) -> tuple[list[int], list[int]]:
    """Queries and latent keys of paper B's `compute_log_prob` (silent-lvr, dp_actor.py) for one row without padding.

    `steps` is the number of latents that were recorded, None without any.
    """
    starts, ends = ([i for i, token in enumerate(ids) if token == marker] for marker in (start, end))
    bounds = ends[-1:] + ([starts[0] + steps] if starts and steps is not None else [])
    queries = list(range(max(bounds) + 1, len(ids))) if bounds else []
    keys: list[int] = []
    remaining, si, ei = steps, 0, 0
    while si < len(starts) and ei < len(ends):
        while ei < len(ends) and ends[ei] <= starts[si]:
            ei += 1
        if ei >= len(ends):
            break
        room = max(0, ends[ei] - starts[si] - 1)
        take = room if remaining is None else min(room, max(0, remaining))
        keys += range(starts[si] + 1, starts[si] + 1 + take)
        remaining = None if remaining is None else remaining - take
        si, ei = si + 1, ei + 1
    return queries or list(range(prompt, len(ids))), keys
