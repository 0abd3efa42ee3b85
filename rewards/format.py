"""Whether a completion keeps to its format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rl_lvr.answers import boxed, extract, text_of

Spans = Sequence[Mapping[str, Any]]


def well_formed(
    completions: Sequence[Any],
    spans: Sequence[Spans],
    *,
    answer_in: Literal["any", "tags", "boxed"] = "any",
    blocks: Sequence[str] = (),
    without: float = 1.0,
    wrong: float = 0.0,
    **_: Any,
) -> list[float]:
    """1 for a well-formed completion, `without` for one that has no latent span, `wrong` for a malformed one.

    Well-formed: every span of `spans` is closed, there is one answer and it is not empty, and each tag named in
    `blocks`, such as think, stands there once, closed, filled, in this order and before the answer. LanteRn
    (2603.25629) gives 0.5 `without`.
    """
    values = []
    for completion, found in zip(completions, spans, strict=True):
        good = all(span["status"] == "closed" for span in found) and _text_is_good(
            text_of(completion), answer_in, blocks
        )
        values.append((1.0 if found else without) if good else wrong)
    return values


def _text_is_good(text: str, answer_in: str, blocks: Sequence[str]) -> bool:
    tagged = re.search(r"</?answer>", text, re.IGNORECASE) is not None
    wanted = list(blocks)
    if answer_in == "tags" or (answer_in == "any" and tagged):
        wanted.append("answer")
    elif answer_in == "boxed" or (answer_in == "any" and boxed(text)):
        if not any(content.strip() for content in boxed(text)):
            return False
    elif not extract(text, "line"):
        return False
    at = 0
    for name in wanted:
        tags = list(re.finditer(rf"<(/?){re.escape(name)}>", text, re.IGNORECASE))
        if [tag[1] for tag in tags] != ["", "/"] or tags[0].start() < at:
            return False
        if not text[tags[0].end() : tags[1].start()].strip():
            return False
        at = tags[1].end()
    return True
