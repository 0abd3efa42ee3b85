"""Where the answer stands in a completion: in answer tags, in a box, or in its last lines.

The rule that finds an answer moves results, so it is an option of whoever asks (`source`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rl_lvr.answers.plain import LONGEST, plain

Source = Literal["any", "tags", "boxed", "line"]

MOST = 100_000
"""Characters of a completion that are searched, from its end."""
_TAG = re.compile(r"<(/?)answer\s*>", re.IGNORECASE)
_THOUGHT = re.compile(r"</(?:think|thinking|reasoning)\s*>", re.IGNORECASE)
_THINKS = re.compile(r"<(?:think|thinking|reasoning)\s*>", re.IGNORECASE)
_BRACES = re.compile(r"\\+(?:boxed|fbox)\s*(\{)|\\+(?:boxed|fbox)\s+([A-Za-z0-9])(?![A-Za-z0-9.])|\\.|[{}]", re.DOTALL)
_HEADING = re.compile(r"\s*(?:#{1,6}\s+|>\s*(?!\s*[-\d.$])|[-*+\u2022]\s+(?![\d.$\\]))*")
_JOINED = re.compile(
    r"[\s$,.;*]{0,10}(?:(?:and|or|\u6216|\u548c|/|&)[\s$*]{0,10}(?:[A-Za-z]\s*=\s*)?\$?)?(?:[A-Za-z]\s*=\s*)?"
)

_IS = (
    r"(?:(?:is|are|was|were)(?!\w)|(?:would|must|should|will|could|can|has\s+to|have\s+to|seems?\s+to|appears?\s+to)"
    r"(?:\s+only)?\s+be(?!\w)|'s(?!\w)|\]\s?:?|[:=]|=>|->|\u662f|\u4e3a|\u70ba|\u5e94\u4e3a|\u5e94\u662f|\u5e94\u8be5\u662f|\u61c9\u70ba|"
    r"\u61c9\u8a72\u662f|\u306f|\u304c|\uc740|\ub294|\uc774)"
)
ANSWER_IS = (
    r"(?:(?<![A-Za-z])(?:answers?|ans|solution|result)(?![A-Za-z])\.?(?:\s+(?:to|for|of)\s+(?:the|this|that|my|your)\s+"
    r"[\w-]+)?|\u7b54\u6848|\u7b54(?=\s*:)|\u6b63\u89e3|\u7b54\u3048|\u89e3\u7b54|\u56de\u7b54|\uc815\ub2f5|\ub2f5)"
    rf"[\s*_\"']*{_IS}(?:[\s*_]*:)?"
)
STATED = re.compile(rf"{ANSWER_IS}[\s*_:]*", re.IGNORECASE)
"""The words that announce an answer, and no further."""


@dataclass(frozen=True)
class Found:
    """An answer as it stands in a completion."""

    text: str
    formal: bool
    """In tags or in a box, not in a line of text."""
    earlier: str | None = None
    """The last line before that announces an answer, where the last one announces none."""
    whole: str = ""
    """All of the text that the line stands in."""


def extract(text: str, source: Source = "any") -> str | None:
    """The last answer in `text`: in answer tags, in \\boxed{}, or its last line; `any` tries them in this order."""
    found = find(text, source)
    return None if found is None else found.text


def find(text: str, source: Source = "any") -> Found | None:
    """As `extract`. What follows a closed <think> comes first; within it, only tags and boxes are looked for.

    Tags or a box that were never closed hold their answer as well, for generation may stop there; an empty one holds
    none. Boxes that are joined by a comma, "and" or "or" are one answer.
    """
    text = plain(text[-MOST:])
    thoughts = list(_THOUGHT.finditer(text))
    said = text[thoughts[-1].end() :] if thoughts else text
    text = said if said.strip() else text
    if source in ("any", "tags"):
        inside = _tagged(said) or _tagged(text)
        if inside:
            box = _boxed(inside)
            return Found(box or inside, formal=True)
    if source in ("any", "boxed"):
        box = _boxed(said) or _boxed(text)
        if box:
            return Found(box, formal=True)
    if source in ("tags", "boxed") or (_THINKS.search(said) and source == "any"):
        return None
    return _line(said, source)


@dataclass(frozen=True)
class Box:
    """One \\boxed{...} of a text, by the places of the whole."""

    start: int
    stop: int
    content: str
    closed: bool
    inner: bool
    """Within another box."""


def boxed(text: str) -> list[str]:
    """What stands in every \\boxed{...} whose braces are balanced."""
    return [box.content for box in _boxes(text) if box.closed]


def boxes(text: str) -> list[Box]:
    """Every box that is in no other, closed or not."""
    return [box for box in _boxes(text) if not box.inner]


def _boxes(text: str) -> list[Box]:
    """In order of their start."""
    found: list[Box] = []
    open_: list[tuple[int, int] | None] = []
    depth = 0
    for brace in _BRACES.finditer(text):
        if brace[1]:
            open_.append((brace.start(), brace.end()))
            depth += 1
        elif brace[2]:
            found.append(Box(brace.start(), brace.end(), brace[2], True, depth > 0))
        elif brace[0] == "{":
            open_.append(None)
        elif brace[0] == "}" and open_:
            box = open_.pop()
            if box is not None:
                depth -= 1
                found.append(Box(box[0], brace.end(), text[box[1] : brace.start()], True, depth > 0))
    unclosed = [box for box in open_ if box is not None]
    if unclosed:  # one, for the content of each would be as long as the text
        start, begin = unclosed[-1]
        found.append(Box(start, len(text), text[begin:], False, False))
    return sorted(found, key=lambda box: box.start)


def _boxed(text: str) -> str | None:
    """The last box that is filled, with those that it is joined to. One that was never closed if no other is there."""
    filled = [box for box in _boxes(text) if box.content.strip()]
    filled = [box for box in filled if box.closed] or filled[-1:]
    if not filled:
        return None
    first = filled[-1]
    joined = [
        re.sub(r"\{([^{}]*)\}", r"\1", first.content.strip()) if first.content[:1] == "{" else first.content.strip()
    ]
    for box in filled[-2::-1]:
        between = text[box.stop : first.start] if box.stop <= first.start else ""
        if len(between) > 30 or not between.strip("$. \n\t*") or not _JOINED.fullmatch(between):
            break
        joined.insert(0, box.content.strip() + (" or " if re.search(r"or|\u6216|/", between) else ", "))
        first = box
    return "".join(joined)


def _tagged(text: str) -> str | None:
    tags = list(_TAG.finditer(text))
    for at in reversed(range(len(tags))):
        if tags[at][1]:
            continue
        closed = at + 1 < len(tags) and tags[at + 1][1]
        if not closed and at + 1 < len(tags):
            continue  # tags that are only spoken of
        inside = text[tags[at].end() : tags[at + 1].start() if closed else len(text)].strip()
        if inside:
            return inside
    return None


def _heading(line: str) -> int:
    """Where a line begins, after the signs of a heading, a quotation or a list."""
    found = _HEADING.match(line)
    return found.end() if found else 0


def _line(text: str, source: Source) -> Found | None:
    lines = [line[_heading(line) :].strip() for line in text[-LONGEST:].splitlines() if line.strip()]
    if not lines or not re.sub(r"</?[A-Za-z]+\s*>", "", lines[-1]).strip():
        return None
    if source == "line":
        return Found(lines[-1], formal=False)
    whole = "\n".join(lines)
    if STATED.search(lines[-1]):
        return Found(lines[-1], formal=False, whole=whole)
    for at in reversed(range(len(lines) - 1)):
        cues = list(STATED.finditer(lines[at]))
        if cues:
            alone = not lines[at][cues[-1].end() :].strip(" *_:#")
            return Found(lines[-1], False, f"{lines[at]} {lines[at + 1]}" if alone else lines[at], whole)
    return Found(lines[-1], False, None, whole)
