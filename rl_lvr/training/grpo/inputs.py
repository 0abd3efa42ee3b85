"""The rows of a generation batch, processed once per prompt: a group repeats its prompt and images row by row.

TRL renders, tokenizes and processes every row, twice. The result here is the same, tensor for tensor. Rows with and
without images, which processors do not take in one call, are processed apart and put together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from trl import GRPOTrainer

from rl_lvr.models import Family, family_of

_SHOWN = ("prompt", "image", "images")
_PASS = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters


def with_image_lists(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` in which images stand as a list in `images`, empty where a row has none; unchanged without such columns.

    TRL takes a batch for one with images by its first row's columns, and None for an image.
    """
    if not any(name in row for row in rows for name in ("image", "images")):
        return list(rows)
    return [{**{k: v for k, v in row.items() if k != "image"}, "images": _images_of(row)} for row in rows]


def _images_of(row: dict[str, Any]) -> list[Any]:
    if "images" in row:
        return list(row["images"] or ())
    return [] if row.get("image") is None else [row["image"]]


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


class OncePerPrompt:
    """The processor of a batch: of neighbouring rows that show the same it sees the first, and answers for all."""

    def __init__(self, processor: Any, family: Family, rows: Sequence[Mapping[str, Any]]) -> None:
        self._processor, self._family = processor, family
        self._sources: list[int] = []
        for number, row in enumerate(rows):
            repeats = number > 0 and all(same(row.get(name), rows[number - 1].get(name)) for name in _SHOWN)
            self._sources.append(self._sources[-1] if repeats else number)
        self._firsts = sorted(set(self._sources))
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

        def call(rows: Sequence[int]) -> Any:
            return self._processor.apply_chat_template(conversation=[kept[row] for row in rows], **how)

        return self._repeated(self._apart(counts, call), counts)

    def __call__(self, *, text: Sequence[str], images: Sequence[Any] | None = None, **how: Any) -> Any:
        counts = [0 if images is None else len(images[row] or ()) for row in self._firsts]

        def call(rows: Sequence[int]) -> Any:
            kept: dict[str, Any] = {"text": [text[self._firsts[row]] for row in rows]}
            if images is not None and counts[rows[0]]:
                kept["images"] = [images[self._firsts[row]] for row in rows]
            return self._processor(**kept, **how)

        return self._repeated(self._apart(counts, call), counts)

    @property
    def image_processor(self) -> Any:
        """TRL gives it the images of all rows, to count tiles."""
        return _WithoutEmptyRows(self._processor.image_processor)

    def _apart(self, counts: Sequence[int], call: Callable[[Sequence[int]], Any]) -> Any:
        """What `call` makes of the rows; if some have images and others none, of each kind in a call of its own."""
        if all(counts) or not any(counts):
            return call(range(len(counts)))
        kinds = [[row for row, count in enumerate(counts) if bool(count) is shown] for shown in (True, False)]
        shown, plain = (call(rows) for rows in kinds)
        images = self._family.image_inputs(shown)
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        order = sorted(range(len(counts)), key=[*kinds[0], *kinds[1]].__getitem__)  # undoes the parting
        merged: dict[str, Any] = {}
        for name, value in shown.items():
            if name in images:
                merged[name] = value
                continue
            fill = tokenizer.pad_token_id if name == "input_ids" else 0
            other = plain[name] if name in plain else _zeros_like(plain["input_ids"])
            merged[name] = _chosen(_stacked(value, other, fill, left=tokenizer.padding_side == "left"), order)
        return type(shown)(merged)

    def _repeated(self, found: Any, counts: Sequence[int]) -> Any:
        order = [self._firsts.index(source) for source in self._sources]
        images: dict[str, Tensor] = {}
        if any(counts):
            rows = self._family.split_images(self._family.image_inputs(found), counts)
            images = self._family.join_images([rows[row] for row in order])
        return type(found)(
            {name: images[name] if name in images else _chosen(value, order) for name, value in found.items()}
        )


def without_empty_images(
    family: Family, inputs: dict[str, Any], images_per_row: Sequence[int], rows: Iterable[int]
) -> dict[str, Any]:
    """A forward's `inputs` for `rows`. Where none of them has an image and others of the batch do, TRL hands over image
    inputs of zero images, which the vision tower does not take."""
    if any(images_per_row[row] for row in rows):
        return inputs
    return {name: value for name, value in inputs.items() if name not in family.image_keys}


def known_to_trl(family: Family, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a pass without the family's image inputs that TRL's method does not take."""
    return {name: value for name, value in inputs.items() if name in _PASS or name not in family.image_keys}


class WithoutEmptyImages:
    """Stands in for the model of a pass without latents over rows of which some have no image."""

    def __init__(self, model: Any, images_per_row: Sequence[int]) -> None:
        self._model, self._images_per_row = model, images_per_row
        self._family = family_of(model)
        self._next = 0

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        rows = range(self._next, self._next + len(input_ids))
        self._next = rows.stop
        return self._model(
            input_ids=input_ids, **without_empty_images(self._family, inputs, self._images_per_row, rows)
        )


class _WithoutEmptyRows:
    """An image processor that is called without the rows that have no image."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Sequence[Any], **how: Any) -> Any:
        return self._processor(images=[row for row in images if row], **how)


def _zeros_like(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else [[0] * len(row) for row in value]


def _stacked(one: Any, other: Any, fill: int, *, left: bool) -> Any:
    """Rows of `one`, then of `other`: lists, or tensors [rows, width] padded with `fill` to one width."""
    if not isinstance(one, Tensor):
        return [*one, *other]
    width = max(one.shape[1], other.shape[1])

    def padded(value: Tensor) -> Tensor:
        more = width - value.shape[1]
        return torch.nn.functional.pad(value, (more, 0) if left else (0, more), value=fill)

    return torch.cat([padded(one), padded(other)])


def _pictures(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _chosen(value: Any, order: Sequence[int]) -> Any:
    return value[torch.tensor(order)] if isinstance(value, Tensor) else [value[row] for row in order]
