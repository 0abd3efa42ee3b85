"""Record: one example with its images and latent targets, and its form in a file. What makes a row valid: schema.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from rl_lvr.data.images import ImageRef
from rl_lvr.data.schema import LATENT, Problem, content_text, structure_problems
from rl_lvr.data.sources import RowError

Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


@dataclass(frozen=True)
class LatentSpec:
    """The targets of one latent span as they are written down: one of `boxes` (pixels), `cells`, `images`."""

    image: int = 0
    boxes: tuple[Box, ...] | None = None
    cells: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    images: tuple[ImageRef, ...] | None = None

    def __len__(self) -> int:
        """How many targets: one for the whole span, or one per latent."""
        return len(self.boxes or self.cells or self.images or ())


@dataclass(frozen=True)
class LatentTarget:
    """The targets of one latent span, ready for a vision tower: normalised boxes, or images of their own."""

    image: int | None
    """Which of the record's images the boxes lie on; None for `aux_images`."""
    boxes: tuple[Box, ...] = ()
    """In [0, 1]: fractions of the image's width and height. One box for the span, or one per latent."""
    aux_images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class Record:
    """One example. Message contents are always lists of parts, whatever the file wrote (TRL's style)."""

    id: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[ImageRef, ...] = ()
    answer: str | None = None
    latents: tuple[LatentSpec, ...] | None = None
    category: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], root: Path | None = None) -> Record:
        """A record from a row of the schema, image paths below `root`; RowError at the first finding."""
        problems = structure_problems(row, confined=root is not None)
        if problems:
            raise RowError(problems[0])
        latents = row.get("latents")
        return cls(
            id=row["id"],
            messages=tuple({"role": m["role"], "content": _parts(m["content"])} for m in row["messages"]),
            images=tuple(_ref(image, root) for image in row.get("images", ())),
            answer=row.get("answer"),
            latents=None if latents is None else tuple(_spec(latent, root) for latent in latents),
            category=row.get("category"),
            meta=dict(row.get("meta", {})),
        )

    def to_row(self) -> dict[str, Any]:
        """The record as the schema writes it; images as paths, or as {bytes, path} where embedded."""
        row: dict[str, Any] = {
            "id": self.id,
            "messages": [{"role": m["role"], "content": _plain(m["content"])} for m in self.messages],
        }
        if self.images:
            row["images"] = [_unref(image) for image in self.images]
        if self.answer is not None:
            row["answer"] = self.answer
        if self.latents is not None:
            row["latents"] = [_unspec(spec) for spec in self.latents]
        if self.category is not None:
            row["category"] = self.category
        if self.meta:
            row["meta"] = self.meta
        return row

    @property
    def is_prompt_only(self) -> bool:
        """True if the messages end with the user: nothing to imitate, only something to answer."""
        return self.messages[-1]["role"] != "assistant"

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages before the assistant's last one (all of them if the record is prompt only)."""
        return list(self.messages if self.is_prompt_only else self.messages[:-1])

    @property
    def completion_text(self) -> str | None:
        """The assistant's last text with `<latent>` for each span; None if the record is prompt only."""
        return None if self.is_prompt_only else content_text(self.messages[-1]["content"])

    @property
    def spans(self) -> int:
        """Latent spans in the assistant's texts."""
        return sum(content_text(m["content"]).count(LATENT) for m in self.messages if m["role"] == "assistant")

    def open_images(self) -> list[Image.Image]:
        """The decoded images, RGB, in the order of the image parts."""
        return [image.open() for image in self.images]

    @property
    def targets(self) -> tuple[LatentTarget, ...]:
        """The targets of each span in order; empty if there are none. Pixel boxes read the image's header."""
        return tuple(self._target(spec, index) for index, spec in enumerate(self.latents or ()))

    def _target(self, spec: LatentSpec, index: int) -> LatentTarget:
        if spec.images is not None:
            return LatentTarget(image=None, aux_images=spec.images)
        if spec.cells is not None and spec.grid is not None:
            rows, cols = spec.grid
            places = (divmod(cell, cols) for cell in spec.cells)
            boxes = tuple((c / cols, r / rows, (c + 1) / cols, (r + 1) / rows) for r, c in places)
            return LatentTarget(image=spec.image, boxes=boxes)
        width, height = self.images[spec.image].size()
        for number, box in enumerate(spec.boxes or ()):
            problem = box_outside(box, width, height, f"latents[{index}].boxes[{number}]")
            if problem is not None:
                raise RowError(problem, f"record {self.id!r}")
        return LatentTarget(
            image=spec.image,
            boxes=tuple((x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in spec.boxes or ()),
        )


def box_outside(box: Sequence[float], width: int, height: int, where: str) -> Problem | None:
    """The finding for a box that ends outside its image."""
    if box[2] <= width and box[3] <= height:
        return None
    return Problem(
        where, f"{list(box)} ends outside the image of {width} x {height} pixels", "clip the box to the image"
    )


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content]


def _plain(content: list[dict[str, Any]]) -> Any:
    return content[0]["text"] if len(content) == 1 and content[0]["type"] == "text" else content


def _ref(image: Any, root: Path | None) -> ImageRef:
    if isinstance(image, Mapping):
        return ImageRef(image.get("path") or "", root, image.get("bytes"))
    return ImageRef(image, root)


def _unref(image: ImageRef) -> Any:
    return image.name if image.data is None else {"bytes": image.data, "path": image.name or None}


def _spec(latent: Mapping[str, Any], root: Path | None) -> LatentSpec:
    if "images" in latent:
        return LatentSpec(images=tuple(_ref(image, root) for image in latent["images"]))
    image = latent.get("image", 0)
    if "cells" in latent:
        rows, cols = latent["grid"]
        return LatentSpec(image=image, cells=tuple(latent["cells"]), grid=(rows, cols))
    return LatentSpec(image=image, boxes=tuple((b[0], b[1], b[2], b[3]) for b in latent["boxes"]))


def _unspec(spec: LatentSpec) -> dict[str, Any]:
    if spec.images is not None:
        return {"images": [_unref(image) for image in spec.images]}
    if spec.cells is not None and spec.grid is not None:
        return {"image": spec.image, "cells": list(spec.cells), "grid": list(spec.grid)}
    return {"image": spec.image, "boxes": [list(box) for box in spec.boxes or ()]}
