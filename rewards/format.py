"""Whether a completion keeps to its format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rl_lvr.answers import boxes, extract, text_of

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
    `blocks`, such as think, stands there once, closed, filled, in this order and before the answer. Latents fill a
    block as text does. LanteRn (2603.25629) gives 0.5 `without`.
    """
    values = []
    for completion, found in zip(completions, spans, strict=True):
        good = all(span["status"] == "closed" for span in found) and _text_is_good(
            text_of(completion), answer_in, blocks, [span.get("at") for span in found if span["latents"]]
        )
        values.append((1.0 if found else without) if good else wrong)
    return values


def _text_is_good(text: str, answer_in: str, blocks: Sequence[str], latents_at: Sequence[int | None]) -> bool:
    """`latents_at`: characters of `text` before each span with latents."""
    end = 0
    for name in blocks:
        inside = _only(name, text)
        if inside is None or inside.start() < end:
            return False
        latents = [at for at in latents_at if at is not None and inside.start(1) <= at <= inside.end(1)]
        if not latents and not inside[1].strip():
            return False
        end = inside.end()
    tagged = re.search(r"</?answer>", text, re.IGNORECASE) is not None
    if answer_in == "tags" or (answer_in == "any" and tagged):
        answer = _only("answer", text)
        return answer is not None and answer.start() >= end and bool(answer[1].strip())
    found = boxes(text)
    if answer_in == "boxed" or found:
        return len(found) == 1 and found[0].start >= end and found[0].closed and bool(found[0].content.strip())
    return bool(extract(text[end:], "line"))


def _only(name: str, text: str) -> re.Match[str] | None:
    """The block `name`, if its tags stand there once, in their order."""
    tags = re.findall(rf"<(/?){re.escape(name)}>", text, re.IGNORECASE)
    if tags != ["", "/"]:
        return None
    return re.search(rf"<{re.escape(name)}>(.*)</{re.escape(name)}>", text, re.IGNORECASE | re.DOTALL)
