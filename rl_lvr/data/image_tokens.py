"""How many tokens an image takes in a prompt, from its size alone, and which sizes a model's processor refuses."""

from __future__ import annotations

from typing import Any

from PIL import Image

_FAULTS = (ValueError, ZeroDivisionError, OverflowError, RuntimeError)


class ImageTokens:
    """Counts by the processor's own arithmetic; one that has none processes a blank image of each size once."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._known: dict[tuple[int, int], int | str] = {}

    def __call__(self, width: int, height: int) -> int:
        """Tokens in the prompt, the frame around an image included. ValueError: the processor takes no such image."""
        found = self._known.get((width, height))
        if found is None:
            try:
                found = self._count(width, height)
            except _FAULTS as error:
                found = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            self._known[width, height] = found
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _count(self, width: int, height: int) -> int:
        arithmetic = getattr(self._processor, "_get_num_multimodal_tokens", None)
        if arithmetic is not None:
            return int(arithmetic(image_sizes=[(height, width)])["num_image_tokens"][0])
        turn = [{"role": "user", "content": [{"type": "image"}]}]
        text = self._processor.apply_chat_template(turn, tokenize=False)
        whole = self._processor(text=[text], images=[[Image.new("RGB", (width, height))]], add_special_tokens=False)
        short = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(whole["input_ids"][0]) - len(short) + 1
