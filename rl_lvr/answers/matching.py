"""From a completion to its answer, and whether two answers agree.

The rule that finds an answer moves results, so it is an option of every reward that needs it (`source`, `kind`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, cast

from rl_lvr.answers.letters import letter
from rl_lvr.answers.mathematics import LONGEST, same_mathematics

Source = Literal["any", "tags", "boxed", "line"]
Kind = Literal["auto", "choice", "numeric", "exact", "math"]

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = r"\boxed{"
_FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_STRONG = re.compile(r"(?<![\w)])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w(])")
"""Not the power of Python."""
_STATED = re.compile(r".*\b(?:is|are|be|equals?|answer\s*:)(?:\s*:)?\s+(?=\S)", re.DOTALL | re.IGNORECASE)
_WORDS = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}[:,]?\s")
_PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-"})
_NUMBER = re.compile(
    r"(?<![\w^.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,30}|(?=\.\d))(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?(?:\s*/\s*\d{1,30})?"
    r"(?!\d|\.\d)"
)


def text_of(message: Any) -> str:
    """The text of a completion or prompt: a string, or TRL's conversational form, a list of messages."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        return text_of(message["content"]) if "content" in message else str(message.get("text", ""))
    return "\n".join(part for part in map(text_of, message or ()) if part)


def extract(text: str, source: Source = "any") -> str | None:
    """The last answer in `text`: in answer tags, in \\boxed{}, or its last line; `any` tries them in this order."""
    if source in ("any", "tags"):
        found = _TAG.findall(text)
        if found or source == "tags":
            return found[-1].strip() if found else None
    if source in ("any", "boxed"):
        boxes = boxed(text)
        if boxes or source == "boxed":
            return boxes[-1].strip() if boxes else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


def boxed(text: str) -> list[str]:
    """What stands in every \\boxed{...} whose braces are balanced."""
    found = []
    begin = text.find(_BOX)
    while begin >= 0:
        depth, at = 1, begin + len(_BOX)
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth == 0:
            found.append(text[begin + len(_BOX) : at - 1])
        begin = text.find(_BOX, begin + len(_BOX))
    return found


def normalise(answer: str) -> str:
    """Case, surrounding punctuation and runs of white space do not count."""
    return " ".join(answer.casefold().split()).strip(" .,:;!?\"'()[]")


def number(text: str) -> Fraction | None:
    """The last number in `text`, exactly: 1,234.5, 3/4, 1e-3. Units and percent signs do not count."""
    found = _NUMBER.findall(text.translate(_PLAIN).replace("{,}", ","))
    if not found:
        return None
    top, _, bottom = found[-1].replace(",", "").replace(" ", "").partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


def formula(text: str) -> str:
    """The mathematics in an answer that may be a sentence: the last one between dollars or the like, or what follows
    "is" or a colon. A text without words is one formula.
    """
    text = text.strip()
    if len(text) > LONGEST or not _WORDS.search(text):
        return text
    text = _STRONG.sub(r"\1", text)
    found = _FORMULA.findall(text)
    if found:
        return next(filter(None, found[-1])).strip(" .")
    stated = _STATED.match(text)
    piece = text[stated.end() :] if stated else text
    return piece.rstrip(" .") if piece.count("{") == piece.count("}") else text


def kind_of(gold: str) -> Kind:
    """What `auto` takes a reference answer for: one letter, a number, LaTeX, or a text."""
    bare = gold.strip().strip("()[]. ")
    if re.fullmatch(r"[A-Z]", bare):
        return "choice"
    if _NUMBER.fullmatch(bare):
        return "numeric"
    return "math" if re.search(r"[\\^$]", gold) else "exact"


def correct(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    kind: Kind = "auto",
    source: Source = "any",
    tolerance: float = 1e-6,
) -> list[bool | None]:
    """Whether each completion gives the reference answer; None where there is no reference, or none can be read."""
    return [
        None if gold is None else _agree(extract(text_of(completion), source), gold, kind, tolerance)
        for completion, gold in zip(completions, answer, strict=True)
    ]


def _agree(given: str | None, gold: str, kind: Kind, tolerance: float) -> bool | None:
    kind = kind_of(gold) if kind == "auto" else kind
    if kind in ("choice", "numeric"):
        read = cast(Callable[[str], Any], letter if kind == "choice" else number)
        wanted = read(gold)
        if wanted is None:
            return None
        if kind == "numeric" and given is not None and "\\" in re.sub(r"\\[%$]", "", given):
            return same_mathematics(gold, formula(given))
        found = None if given is None else read(given)
        if found is None or kind == "choice":
            return bool(found == wanted)
        return bool(abs(found - wanted) <= Fraction(tolerance) * abs(wanted))
    if given is None:
        return False
    same = normalise(given) == normalise(gold)
    return same if same or kind == "exact" else same_mathematics(gold, formula(given))
