"""Token ids with expanded image tokens -> what vLLM's processors expand themselves, one placeholder per image."""

from __future__ import annotations

from collections.abc import Sequence

from rl_lvr.errors import UserError


def collapse(index: int, ids: Sequence[int], image: int, pictures: int, frame: tuple[int, int] | None) -> list[int]:
    """Prompt `ids` of request `index` with each image's tokens collapsed into one.

    `frame`: the tokens that vLLM writes around an image by itself and that must go too (InternVL).
    """
    short: list[int] = []
    runs = 0
    for token in ids:
        if token == image:
            if short and short[-1] == image:
                continue
            if frame is not None and short and short[-1] == frame[0]:
                short.pop()
            runs += 1
        elif frame is not None and token == frame[1] and short and short[-1] == image:
            continue
        short.append(token)
    if runs == pictures:
        return short
    if runs == 1:  # images without a token in between
        at = short.index(image)
        return [*short[:at], *[image] * pictures, *short[at + 1 :]]
    raise UserError(
        f"request {index}: its prompt has {runs} groups of image tokens for {pictures} pictures: give every picture, "
        "in the prompt's order."
    )
