"""Batches with images for the tiny models. pytest puts this folder on the path: `from helpers import ...`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

WORDS = ("red", "green", "blue", "yellow", "from", "hops", "what", "is", "next", "1", "2", "3")


def noise_image(seed: int, height: int = 56, width: int = 84) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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
