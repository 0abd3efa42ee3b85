"""The record schema: its fields, and everything that can be wrong with a record without opening an image.

`structure_problems` is the one judge: reading a record (records.py) stops at its first finding, checking a
file (check.py) lists them all.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rl_lvr.data.images import path_error

LATENT = "<latent>"
"""One latent span in the assistant's text, whatever the marker tokens of the model's format are."""

FIELDS = ("id", "messages", "images", "answer", "latents", "category", "meta")
MESSAGE_FIELDS = ("role", "content")
PART_FIELDS = ("type", "text")
LATENT_FIELDS = ("image", "boxes", "cells", "grid", "images")
ROLES = ("system", "user", "assistant")


class Problem(NamedTuple):
    """One thing that is wrong: where in the record, what, and what to do about it."""

    field: str
    what: str
    cure: str


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    for type_, name in ((str, "a string"), (list, "a list"), (Mapping, "an object"), (bytes, "bytes")):
        if isinstance(value, type_):
            return name
    return f"a {type(value).__name__}"


def content_text(content: Any) -> str:
    """The text of a message's content (a string or a list of parts)."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def unknown_fields(given: Any, allowed: tuple[str, ...], where: str = "") -> Iterator[Problem]:
    for name in given:
        if name in allowed:
            continue
        near = difflib.get_close_matches(str(name), allowed, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"remove it, or choose from {', '.join(allowed)}"
        if not near and not where:
            cure += " (what is your own goes into meta)"
        shown = name if str(name).isidentifier() else repr(name)[:60]
        yield Problem(f"{where}.{shown}" if where else shown, "unknown field", cure)


def structure_problems(row: Any, confined: bool = True) -> list[Problem]:
    """All findings in one record's structure. Image files, image sizes and marker tokens are check.py's.

    `confined`: image paths must stay below a folder (any path may stand in a data set built by the caller).
    """
    return list(_record(row, confined))


def _record(row: Any, confined: bool) -> Iterator[Problem]:
    if not isinstance(row, Mapping):
        yield Problem("record", f"is {kind(row)}", "write one JSON object per line")
        return
    yield from unknown_fields(row, FIELDS)
    for name in ("id", "messages"):
        if name not in row:
            yield Problem(name, "is missing", f"every record needs {name}")
    for name in ("id", "answer", "category"):
        if name in row:
            yield from _text(row[name], name)
    if "meta" in row and not isinstance(row["meta"], Mapping):
        yield Problem("meta", f"is {kind(row['meta'])}", "make it an object with whatever keys you like")

    images = row.get("images", [])
    count = None
    if isinstance(images, list):
        count = len(images)
        for index, image in enumerate(images):
            yield from _image(image, f"images[{index}]", confined)
    else:
        yield Problem("images", f"is {kind(images)}", "make it a list of image paths")

    spans = None
    if "messages" in row:
        problems = list(_messages(row["messages"]))
        yield from problems
        if not problems:
            parts, spans = _count(row["messages"])
            if count is not None and parts != count:
                yield Problem(
                    "messages",
                    f'holds {parts} image parts ({{"type": "image"}}) but images holds {count}',
                    "give one image part per entry of images, in the same order",
                )
    if "latents" in row:
        yield from _latents(row["latents"], count, spans, confined)


def _text(value: Any, name: str) -> Iterator[Problem]:
    if not isinstance(value, str):
        yield Problem(name, f"is {kind(value)}", "make it a string")
    elif not value.strip():
        yield Problem(name, "is empty", "fill it in" + ("" if name == "id" else ", or leave the field out"))


def _image(image: Any, where: str, confined: bool) -> Iterator[Problem]:
    """A path, or (columnar files) a struct of bytes and path."""
    if isinstance(image, Mapping):
        yield from unknown_fields(image, ("bytes", "path"), where)
        data, path = image.get("bytes"), image.get("path")
        if data is not None:
            if not isinstance(data, bytes):
                yield Problem(f"{where}.bytes", f"is {kind(data)}", "store the encoded image as binary")
            elif not data:
                yield Problem(f"{where}.bytes", "is empty", "store the encoded image")
            return
        image = path
    if not isinstance(image, str):
        yield Problem(where, f"is {kind(image)}", "make it an image path, as a string")
        return
    error = path_error(image) if confined else None
    if error is not None:
        yield Problem(where, error.what, error.cure)


def _messages(messages: Any) -> Iterator[Problem]:
    if not isinstance(messages, list):
        yield Problem("messages", f"is {kind(messages)}", "make it a list of {role, content} objects")
        return
    if not messages:
        yield Problem("messages", "is empty", "start with a message of the user")
        return
    previous = None
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            yield Problem(where, f"is {kind(message)}", "make it an object with role and content")
            return
        yield from unknown_fields(message, MESSAGE_FIELDS, where)
        role = message.get("role")
        if role not in ROLES:
            yield Problem(f"{where}.role", f"is {role!r}", f"use one of {', '.join(ROLES)}")
            return
        wanted: tuple[str, ...] = ("user",) if previous in ("system", "assistant") else ("assistant",)
        if previous is None:
            wanted = ("system", "user")
        if role not in wanted:
            after = "first" if previous is None else f"after {previous}"
            yield Problem(
                f"{where}.role",
                f"{role!r} stands {after}",
                "order the messages: system (optional), then user and assistant in turn",
            )
        yield from _content(message.get("content"), role, f"{where}.content")
        previous = role
    if previous == "system" and len(messages) == 1:
        yield Problem("messages", "holds no message of the user", "add the user's message")


def _content(content: Any, role: str, where: str) -> Iterator[Problem]:
    if isinstance(content, list):
        for index, part in enumerate(content):
            yield from _part(part, role, f"{where}[{index}]")
        text = "".join(p.get("text") or "" for p in content if _is_text(p))
        filled = bool(text.strip()) or any(isinstance(p, Mapping) and p.get("type") == "image" for p in content)
    elif isinstance(content, str):
        text, filled = content, bool(content.strip())
    else:
        yield Problem(where, f"is {kind(content)}", "make it a string or a list of parts")
        return
    if not filled:
        yield Problem(where, "is empty", "fill it in, or remove the message")
    if role != "assistant" and LATENT in text:
        yield Problem(where, f"holds {LATENT}", "latent spans belong to the assistant's text; remove it here")


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _part(part: Any, role: str, where: str) -> Iterator[Problem]:
    if not isinstance(part, Mapping):
        yield Problem(where, f"is {kind(part)}", 'make it {"type": "image"} or {"type": "text", "text": ...}')
        return
    yield from unknown_fields(part, PART_FIELDS, where)
    type_ = part.get("type")
    if type_ == "text":
        if not isinstance(part.get("text"), str):
            yield Problem(f"{where}.text", f"is {kind(part.get('text'))}", "make it a string")
    elif type_ == "image":
        if "text" in part:
            yield Problem(f"{where}.text", "stands in an image part", "put the text into a text part")
        if role != "user":
            yield Problem(where, f"is an image in a message of the {role}", "only the user shows images")
    else:
        yield Problem(f"{where}.type", f"is {type_!r}", "use image or text")


def _count(messages: Any) -> tuple[int, int | None]:
    """Image parts, and latent spans (None if the messages end with the user: spans are yet to be written)."""
    parts = sum(part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"])
    spans = sum(content_text(m["content"]).count(LATENT) for m in messages if m["role"] == "assistant")
    return parts, spans if messages[-1]["role"] == "assistant" else None


def _latents(latents: Any, images: int | None, spans: int | None, confined: bool) -> Iterator[Problem]:
    if not isinstance(latents, list):
        yield Problem("latents", f"is {kind(latents)}", "make it a list with one object per latent span")
        return
    if spans is not None and len(latents) != spans:
        yield Problem(
            "latents",
            f"has {len(latents)} entries but the assistant's text has {spans} {LATENT}",
            f"give one entry per {LATENT}, or leave latents out if the spans have no targets",
        )
    for index, latent in enumerate(latents):
        yield from _latent(latent, images, f"latents[{index}]", confined)


def _latent(latent: Any, images: int | None, where: str, confined: bool) -> Iterator[Problem]:
    if not isinstance(latent, Mapping):
        yield Problem(where, f"is {kind(latent)}", "make it an object with boxes, cells or images")
        return
    yield from unknown_fields(latent, LATENT_FIELDS, where)
    given = [name for name in ("boxes", "cells", "images") if name in latent]
    if len(given) != 1:
        have = " and ".join(given) if given else "none of boxes, cells, images"
        yield Problem(where, f"has {have}", "give exactly one of boxes, cells, images")
        return
    what = given[0]
    value = latent[what]
    if not isinstance(value, list):
        yield Problem(f"{where}.{what}", f"is {kind(value)}", "make it a list")
        return
    if not value:
        yield Problem(f"{where}.{what}", "is empty", "give at least one, or remove the targets")
    if what == "images":
        for name in ("image", "grid"):
            if name in latent:
                yield Problem(f"{where}.{name}", "does not go with images", "remove it")
        for i, image in enumerate(value):
            yield from _image(image, f"{where}.images[{i}]", confined)
        return
    yield from _image_index(latent, images, where)
    if what == "boxes":
        if "grid" in latent:
            yield Problem(f"{where}.grid", "does not go with boxes", "remove it, or give cells")
        for i, box in enumerate(value):
            yield from _box(box, f"{where}.boxes[{i}]")
    else:
        yield from _cells(latent, where)


def _image_index(latent: Mapping[str, Any], images: int | None, where: str) -> Iterator[Problem]:
    index = latent.get("image", 0)
    if not is_int(index):
        yield Problem(f"{where}.image", f"is {kind(index)}", "make it the number of an image, from 0")
    elif images is not None and not 0 <= index < images:
        yield Problem(f"{where}.image", f"is {index} but the record has {images} images", "count images from 0")


def _box(box: Any, where: str) -> Iterator[Problem]:
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        yield Problem(where, f"is {box!r}"[:80], "make it four numbers [x0, y0, x1, y1] in pixels")
        return
    x0, y0, x1, y1 = box
    if x0 > x1 or y0 > y1:
        yield Problem(where, f"{box} has its corners in the wrong order", "write [left, top, right, bottom]")
    elif x0 == x1 or y0 == y1:
        yield Problem(where, f"{box} has no area", "make right > left and bottom > top")
    elif x1 - x0 < 1 or y1 - y0 < 1:
        yield Problem(
            where,
            f"{box} is smaller than one pixel",
            "boxes are pixels; multiply boxes that run from 0 to 1 by the image's width and height",
        )
    if min(box) < 0:
        yield Problem(where, f"{box} begins outside the image", "clip the box to the image")


def _cells(latent: Mapping[str, Any], where: str) -> Iterator[Problem]:
    grid = latent.get("grid")
    if not isinstance(grid, list) or len(grid) != 2 or not all(is_int(v) and v > 0 for v in grid):
        yield Problem(f"{where}.grid", f"is {grid!r}"[:80], "give [rows, cols], two whole numbers above 0")
        return
    count = grid[0] * grid[1]
    for i, cell in enumerate(latent["cells"]):
        if not is_int(cell):
            yield Problem(f"{where}.cells[{i}]", f"is {kind(cell)}", "make it a whole number")
        elif not 0 <= cell < count:
            yield Problem(
                f"{where}.cells[{i}]",
                f"is {cell}, outside the grid of {grid[0]} x {grid[1]} cells",
                f"cells are counted row by row from 0 to {count - 1}",
            )
