"""Which option of a multiple choice a text names: conservative, for a letter read where none was meant is a reward."""

from __future__ import annotations

import re

LOOKS_BACK = 100
"""Characters before a letter in which it may be denied."""
NESTED = 5
"""Commands around a letter, one in another."""
_MARKUP = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|boxed|fbox|bf|rm)\s*\{([^{}]*)\}"
)
_QUOTED = re.compile("(?<!\\w)['\"\u2018\u201c]([A-Za-z])['\"\u2019\u201d](?!\\w)")
_DRESS = re.compile(r"\*+|(?<!\w)_+|_+(?!\w)|`|\$|\\[()\[\]]")
"""Emphasis and the borders of formulas."""

_DELIMITER = r"(?:\s*[)\].:;!]|\s*,(?=\s)|\s+[-\u2013\u2014]+\s|\s*[\r\n]|\s*$)"
_GOES_ON = r"(?:\s+(?:because|since|as|for|which|with)\b)"
_END = rf"(?:(?<=[A-Z])(?=\s+(?![-+*/=<>^])\S)(?<![AI])|(?={_DELIMITER})|(?={_GOES_ON}))"
"""After a letter: a delimiter or a conjunction; after a capital also a word, but for the words A and I."""
_LETTER = rf"[(\[]?([A-Za-z])(?![\w'\u2019+=^-]){_END}"

_SAID = re.compile(
    r"\b(?i:answer(?:\s+to\s+(?:the|this|that)\s+\w+)?|(?:correct|right|best|final|my|the)\s+(?:option|choice|letter)|"
    r"(?:option|choice|letter)(?=\s*[:\uff1a]))"
    r"(?i:\s+(?:is|would\s+be|must\s+be|should\s+be)\b|\s*[:\uff1a=])[\s:\uff1a]*"
    r"(?i:(?:therefore|thus|then|clearly|indeed|likely|probably)\b[\s:,]*)?"
    rf"(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\b[\s:]*)?{_LETTER}"
)
"""The answer is B. Answer: B. The correct option is (B)."""
_PRAISED = re.compile(
    r"(?<!\w)[(\[]?([A-Z])[)\]]?(?i:\s+is\s+(?:(?:clearly|indeed|therefore|thus)\s+)?(?:the\s+)?"
    r"(?:only\s+)?(?:correct|right)\b)"
)
"""B is correct."""
_NAMED = re.compile(rf"\b(?i:answer|option|choice)(?:\s+|(?=[(\[])){_LETTER}")
"""Option B."""
_WHOLE = re.compile(
    rf"[\s(\[]*([A-Za-z])(?:\s*$|\s*[)\].:!]|\s+[-\u2013\u2014]+\s|\s*[\r\n]|(?<![AI])(?:,\s|{_GOES_ON}))"
)
"""A text that begins with the letter alone."""

_REJECTED = re.compile(
    r"[)\]]?,?\s+(?i:(?:which\s+)?(?:is|are|was|were|seems?|looks?|can|cannot|could|would|does|must)"
    r"(?:n['\u2019]t)?\s+(?:clearly\s+|also\s+|definitely\s+)?(?:not|never|n['\u2019]t|be\s+ruled|be\s+excluded|wrong|incorrect|false|a\s+distractor|out)\b)"
)
"""What follows a letter that is not meant."""
_OTHERS = re.compile(
    r"[)\]]?\s*(?:[,/&]|\b(?i:or|and|nor)\b|,\s*(?i:or|and)\b|(?<=[)\]])\s*(?=[(\[]))\s*(?i:(?:option|choice)\s+)?"
    r"[(\[]?[A-Z](?=[)\]]|\s*[.,;:/&]|\s*$|\s+(?i:or|and)\b)(?![)\]]?\s+(?i:is)\b)"
)
"""More letters after one: a hedge is no answer."""
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|if|whether|wrong|incorrect|false|except|than|without|unlike|excludes?|excluding|"
    r"eliminates?|eliminating|rejects?|rejecting|rules?\s+out|ruling\s+out)|n['\u2019]t)"
    r"(?:\s+(?:the|that|this|it|is|be|a|an|case|correct|right|final|best|true))*[\s(\[]*$",
    re.IGNORECASE,
)
"""What stands before a letter that is not meant."""
_LISTED = re.compile(r"(?<!\w)[A-Z][)\]]?\s*(?:,\s*)?(?i:or|and|nor)\s+(?i:(?:option|choice)\s+)?[(\[]?$")


def letter(text: str) -> str | None:
    """The option that a multiple-choice answer names: `B`, `(b)`, `B. red`, `Option B`, "The answer is **B**.", with or
    without text after it. The last one that is stated counts. None where letters are only weighed, denied or listed.
    """
    text = _bare(text)
    for cue in (_SAID, _PRAISED):
        stated = [found for found in cue.finditer(text) if _meant(text, found, listed=cue is _PRAISED)]
        if stated:
            return stated[-1][1].upper()
    whole = _WHOLE.match(text)
    if whole:
        return None if _hedges(text, whole.end(1)) else whole[1].upper()
    named = [found for found in _NAMED.finditer(text) if _meant(text, found, listed=True)]
    if not named:
        return None
    # "Option B" says what is meant at the start or the end of a text; in between, options are discussed.
    last = named[-1]
    at_an_end = last.start() == 0 or not text[last.end(1) :].strip(" )].")
    return last[1].upper() if at_an_end else None


def _bare(text: str) -> str:
    for _ in range(NESTED):
        text = _MARKUP.sub(r"\1", text)
    return _QUOTED.sub(r"\1", _DRESS.sub("", text)).strip()


def _meant(text: str, found: re.Match[str], listed: bool) -> bool:
    before = text[max(0, found.start() - LOOKS_BACK) : found.start()]
    denied = _DENIED.search(before) or (listed and _LISTED.search(before))
    return not denied and not _REJECTED.match(text, found.end(1)) and not _hedges(text, found.end(1))


def _hedges(text: str, end: int) -> bool:
    return _OTHERS.match(text, end) is not None
