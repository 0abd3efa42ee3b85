"""Token ids with expanded image tokens -> what vLLM's processors expand themselves, one placeholder per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rl_lvr.errors import UserError
from rl_lvr.models import ImageFrame


def collapse(index: int, ids: Sequence[int], image: int, pictures: int, frame: ImageFrame | None) -> list[int]:
    """Return the prompt `ids` of request `index` with each image's tokens collapsed into one.

    Args:
        image: The image token.
        pictures: How many images the request has.
        frame: The tokens that vLLM writes around an image by itself, and that must go too.
    """
    blocks = list(_blocks(ids, image, frame))
    if len(blocks) == 1:  # images without a token in between
        (block,) = blocks
        return [*ids[: block.start], *[image] * pictures, *ids[block.stop :]]
    if len(blocks) != pictures:
        raise UserError(
            f"request {index}: its prompt has {len(blocks)} groups of image tokens for {pictures} pictures: give every "
            "picture, in the prompt's order."
        )
    short: list[int] = []
    begin = 0
    for block in blocks:
        short += [*ids[begin : block.start], image]
        begin = block.stop
    return [*short, *ids[begin:]]


def _blocks(ids: Sequence[int], image: int, frame: ImageFrame | None) -> Iterator[range]:
    """The places of each image's tokens, with the frame around them. Images side by side without a frame are one."""
    inside = {image} if frame is None else {image, frame.first, frame.last, *frame.between}
    at = 0
    while at < len(ids):
        if ids[at] not in inside:
            at += 1
            continue
        begin = at
        while at < len(ids) and ids[at] in inside:
            at += 1
            if frame is not None and tuple(ids[at - 1 : at + 1]) == (frame.last, frame.first):
                break  # the next image follows at once
        edges = {image} if frame is None else {image, frame.first, frame.last}
        places = [place for place in range(begin, at) if ids[place] in edges]
        if image in ids[begin:at]:
            yield range(places[0], places[-1] + 1)
