"""What of a completion is text, and what of a text would be read as a control token. Both go by token ids, not strings.

A control token is one that the tokenizer calls special, a marker of the latent format or an image placeholder of the
family, whatever the tokenizer calls these. Other added tokens, such as Qwen3's `<think>`, are text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rl_lvr.latents.format import FormatIds

_NOT_WRITTEN = ("type", "text", "image", "image_url", "input_image", "images", "video", "video_url", "uuid")
"""Keys of a content part that no template writes out, and `text`, which is judged with its neighbours."""


def marker_ids(markers: FormatIds | None) -> frozenset[int]:
    """Ids of the format's markers and of the family's placeholders."""
    if markers is None:
        return frozenset()
    return frozenset({*markers.never_sampled, *(() if markers.start is None else (markers.start,))})


def without_markers(ids: Iterable[int], markers: FormatIds | None) -> list[int]:
    """`ids` without spans, stray markers and placeholders. What the tokenizer calls special stays."""
    left_out = marker_ids(markers)
    return [token for token in map(int, ids) if token not in left_out]


def completion_text(ids: Iterable[int], tokenizer: Any, markers: FormatIds | None = None) -> str:
    """The text of a completion, or of a part of one: without spans, markers, placeholders and special tokens."""
    text: str = tokenizer.decode(without_markers(ids, markers), skip_special_tokens=True)
    return text


class ControlTokens:
    """The control tokens of a tokenizer, and whether a text holds one."""

    def __init__(self, tokenizer: Any, markers: FormatIds | None = None, placeholders: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.markers = marker_ids(markers) - frozenset(placeholders)
        """Ids of the format's own markers, which form spans in an assistant's text."""
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        self.ids = frozenset({*special, *marker_ids(markers), *map(int, placeholders)})

    def found(self, text: str, allowed: frozenset[int] = frozenset()) -> int | None:
        """The id of the first control token that the tokenizer reads in `text`; None if there is none."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else ()
        return next((token for token in ids if token in self.ids and token not in allowed), None)

    def in_messages(self, messages: Sequence[Mapping[str, Any]], where: str = "messages") -> tuple[str, str] | None:
        """The place of the first control token in chat messages, and the token; None if there is none."""
        for index, message in enumerate(messages):
            found = self.in_value(message, f"{where}[{index}]")
            if found is not None:
                return found
        return None

    def in_value(self, value: Any, where: str) -> tuple[str, str] | None:
        """As `in_messages`, of anything that a chat template may write: a message, a tool's schema."""
        for place, text in _texts(value, where):
            token = self.found(text)
            if token is not None:
                return place, str(self.tokenizer.convert_ids_to_tokens(token))
        return None


def joined_parts(content: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Texts of a message's content, by the number of their first part. Neighbours are one text, as templates write."""
    first, text = 0, ""
    for number, part in enumerate([*content, None]):
        piece = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if isinstance(piece, str):
            first = first if text else number
            text += piece
        elif text:
            yield first, text
            text = ""


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield f"{where}.{name}", str(name)
            if name == "content" and isinstance(inner, Sequence) and not isinstance(inner, str):
                for number, text in joined_parts(inner):
                    yield f"{where}.content[{number}]", text
                others = [
                    (f"{where}.content[{number}]", {k: v for k, v in part.items() if k not in _NOT_WRITTEN})
                    for number, part in enumerate(inner)
                    if isinstance(part, Mapping)
                ]
                for place, rest in others:
                    yield from _texts(rest, place)
            else:
                yield from _texts(inner, f"{where}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        for number, inner in enumerate(value):
            yield from _texts(inner, f"{where}[{number}]")
