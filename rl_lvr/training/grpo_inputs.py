"""The rows of a generation batch, processed once per prompt: a group repeats its prompt and images row by row.

TRL renders, tokenizes and processes every row, twice. The result here is the same, tensor for tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from rl_lvr.models import Family

_SHOWN = ("prompt", "image", "images")


@contextmanager
def processed_once(trainer: Any, family: Family, rows: Sequence[dict[str, Any]]) -> Iterator[None]:
    """While `trainer` prepares `rows`, its processor sees only the first of neighbours that show the same."""
    processor = trainer.processing_class
    sources: list[int] = []
    for number, row in enumerate(rows):
        repeats = number > 0 and all(same(row.get(name), rows[number - 1].get(name)) for name in _SHOWN)
        sources.append(sources[-1] if repeats else number)
    trainer.processing_class = _OncePerPrompt(processor, family, sources)
    try:
        yield
    finally:
        trainer.processing_class = processor


def same(one: Any, other: Any) -> bool:
    """Whether two values are surely equal; kinds that are not known here are not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, str | int | float | bytes | Image) and bool(one == other)


class _OncePerPrompt:
    """A processor in whose calls row i of the batch is answered with row `sources[i]`."""

    def __init__(self, processor: Any, family: Family, sources: Sequence[int]) -> None:
        self._processor, self._family, self._sources = processor, family, sources
        self._firsts = sorted(set(sources))
        self._last: tuple[Any, Any, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def apply_chat_template(self, conversation: Sequence[Any], **how: Any) -> Any:
        if not how.get("tokenize", False):
            asked = (conversation, how)
            if self._last is None or not same(self._last[:2], asked):
                self._last = (*asked, self._processor.apply_chat_template(conversation, **how))
            return self._last[2]
        kept = [conversation[row] for row in self._firsts]
        counts = [sum(_pictures(message) for message in messages) for messages in kept]
        return self._repeated(self._processor.apply_chat_template(conversation=kept, **how), counts)

    def __call__(self, *, text: Sequence[str], images: Sequence[Any] | None = None, **how: Any) -> Any:
        kept: dict[str, Any] = {"text": [text[row] for row in self._firsts]}
        counts = [0] * len(self._firsts)
        if images is not None:
            kept["images"] = [images[row] for row in self._firsts]
            counts = [len(row or ()) for row in kept["images"]]
        return self._repeated(self._processor(**kept, **how), counts)

    def _repeated(self, found: Any, counts: Sequence[int]) -> Any:
        order = [self._firsts.index(source) for source in self._sources]
        images: dict[str, Tensor] = {}
        if any(counts):
            rows = self._family.split_images(self._family.image_inputs(found), counts)
            images = self._family.join_images([rows[row] for row in order])
        return type(found)(
            {name: images[name] if name in images else _chosen(value, order) for name, value in found.items()}
        )


def _pictures(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _chosen(value: Any, order: Sequence[int]) -> Any:
    return value[torch.tensor(order)] if isinstance(value, Tensor) else [value[row] for row in order]
