"""Whether a completion gives the reference answer: right, wrong, unreadable or unscored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rl_lvr.answers.extraction import Found, Source, find
from rl_lvr.answers.letters import is_only_a_letter, letter, lists_options
from rl_lvr.answers.mathematics import formula, mathematics_is, same_mathematics
from rl_lvr.answers.numbers import is_only_a_number, read_number, read_quantity, same_quantity
from rl_lvr.answers.plain import bare, plain, text_of
from rl_lvr.answers.texts import normalise, text_is
from rl_lvr.answers.verdict import Verdict

Kind = Literal["auto", "choice", "numeric", "exact", "math"]

_LABELLED = re.compile(r"(?:([A-Z])[).:]|\(([A-Z])\)|\[([A-Z])\])\s+(\S.*)", re.DOTALL)
"""A reference such as "B. red"."""
_NUMBERS = re.compile(r"[(\[{]?\s*[-+]?[\d.]+\s*(?:,\s*[-+]?[\d.]+\s*)+[)\]}]?")
_RELATION = re.compile(r"(?=.*\d)(?=.*[a-z<>=\u2264\u2265])(?!.*[a-z]{2})[\d.a-z+\-*/()=<>\u2264\u2265\s]+")
"""x > 5, x = 5, 2x + 1."""
_WORDS = re.compile(r"[^\W\d_]{2,40}(?:[\s-]+[^\W\d_]{1,40})*")
_LABEL = re.compile(r"[(\[]?[A-Z][)\].:]\s")
FIRST = 6
"""Words of a first line that can be an answer which the next lines explain."""
_COMMON = frozenset(["a", "an", "the", "of", "in", "on", "at", "to", "by", "and", "or"])


@dataclass(frozen=True)
class Match:
    """One completion held against its reference."""

    verdict: Verdict
    text: str | None = None
    """Where the answer was looked for; None if there was no such place."""

    @property
    def right(self) -> bool | None:
        """None where it is unscored; what is unreadable is not right."""
        return None if self.verdict is Verdict.UNSCORED else self.verdict is Verdict.RIGHT


def match(
    completion: Any, reference: str | None, kind: Kind = "auto", source: Source = "any", tolerance: float = 1e-6
) -> Match:
    """Hold `completion` against `reference`.

    Args:
        completion: Text, or a list of messages.
        reference: The right answer; None leaves the completion unscored.
        kind: choice (a letter), numeric, exact (text), math (LaTeX), or auto, which looks at the reference.
        source: Where the answer stands: tags, boxed, line (the last), or any, which tries them in this order.
        tolerance: Relative tolerance of numbers.
    """
    if reference is None or not reference.strip():
        return Match(Verdict.UNSCORED)
    reference = plain(reference).strip()
    kind = kind_of(reference) if kind == "auto" else kind
    if not _readable(reference, kind):
        return Match(Verdict.UNSCORED)
    found = find(text_of(completion), source)
    if found is None:
        return Match(Verdict.UNREADABLE)
    if kind == "choice":
        return Match(_choice(found, reference), found.text)
    text = _announcing(found, kind)
    if kind == "exact":
        return Match(Verdict.of(text_is(text, reference)), text)
    if kind == "math":
        if _WORDS.fullmatch(bare(reference)):
            return Match(Verdict.of(text_is(text, reference)), text)
        return Match(mathematics_is(text, reference, tolerance), text)
    return Match(_numeric(text, found.formal, reference, tolerance), text)


def matches(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    kind: Kind = "auto",
    source: Source = "any",
    tolerance: float = 1e-6,
) -> list[Match]:
    """Hold each completion against its reference, as `match` does."""
    return [match(*pair, kind, source, tolerance) for pair in zip(completions, answer, strict=True)]


def correct(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    kind: Kind = "auto",
    source: Source = "any",
    tolerance: float = 1e-6,
) -> list[bool | None]:
    """Whether each completion gives the reference answer; None where there is no reference, or none can be read."""
    return [found.right for found in matches(completions, answer, kind, source, tolerance)]


def kind_of(reference: str) -> Kind:
    """What `auto` takes a reference for: a letter with or without its text, a number with or without a unit, LaTeX or a
    list of numbers, else a text.
    """
    text = plain(reference).strip()
    inside = bare(text).strip("()[]. ")
    if re.fullmatch(r"[A-Z]", inside) or _LABELLED.fullmatch(bare(text)):
        return "choice"
    quantity = read_quantity(text)
    if re.fullmatch(r"\d+0s", text):  # the 1990s
        return "exact"
    if quantity is not None and not re.search(r"\^|frac", text):
        words = [word for word in quantity.words if word.casefold() not in _COMMON]
        if len(words) <= 1 and all(word.islower() for word in words):
            return "numeric"
    if _NUMBERS.fullmatch(text) or _RELATION.fullmatch(text):
        return "math"
    latex = re.search(r"[\\^$]", re.sub(r"\\text\s*\{([^{}\\$^]*)\}", r"\1", text))
    return "math" if latex else "exact"


def _readable(reference: str, kind: Kind) -> bool:
    if kind == "choice":
        return _labelled(reference) is not None or letter(reference) is not None
    if kind == "numeric":
        return read_number(reference, formal=True) is not None
    return True


def _labelled(reference: str) -> tuple[str, str] | None:
    found = _LABELLED.fullmatch(bare(reference))
    return (found[1] or found[2] or found[3], found[4]) if found else None


def _choice(found: Found, reference: str) -> Verdict:
    labelled = _labelled(reference)
    wanted = labelled[0] if labelled else letter(reference)
    given = _letter_in(found)
    if given is None and labelled:
        return Verdict.RIGHT if text_is(_announcing(found, "exact"), labelled[1]) else Verdict.UNREADABLE
    return Verdict.of(None if given is None else given == wanted)


def _letter_in(found: Found) -> str | None:
    """The letter of a formal answer; of a text that of its last line, or the last that it states."""
    if found.formal or not found.whole or is_only_a_letter(found.text):
        return letter(found.text)
    if found.earlier is not None:
        stated = letter(found.whole, stated=True)
        if stated is not None:
            return stated
    if lists_options(found.whole):
        return letter(found.whole, stated=True)
    return letter(found.text) or letter(found.whole, stated=True) or _first_letter(found.whole)


def _first_letter(text: str) -> str | None:
    """The letter that a text begins with before it explains: "(B) red", then lines without labels."""
    first, *rest = text.split("\n")
    labelled = any(_LABEL.match(line) for line in rest)
    return letter(first) if len(first.split()) <= FIRST and not labelled else None


def _announcing(found: Found, kind: Kind) -> str:
    """The last line, or the one before it that announces the answer. A number alone in the last line needs none; one
    alone in the first line, or yes or no, is explained by what follows."""
    first = found.whole.split("\n", 1)[0]
    if found.earlier is not None and not (kind in ("numeric", "math") and is_only_a_number(found.text)):
        return found.earlier
    explained = first != found.text and found.earlier is None and not is_only_a_number(found.text)
    begins = is_only_a_number(first) if kind in ("numeric", "math") else normalise(first) in ("yes", "no")
    return first if explained and begins and kind != "choice" else found.text


def _numeric(text: str, formal: bool, reference: str, tolerance: float) -> Verdict:
    gold, given = read_number(reference, formal=True), read_number(text, formal)
    if given is None:
        return Verdict.UNREADABLE
    assert gold is not None
    if gold.quantity is not None and given.quantity is not None:
        return Verdict.of(same_quantity(gold.quantity, given.quantity, tolerance))
    expression = given.expression if given.quantity is None else formula(text)
    if gold.quantity is None or re.search(r"[\\^!\u221a]", given.expression):
        verdict = same_mathematics(reference, expression or text)
        return Verdict.WRONG if verdict is Verdict.UNREADABLE else verdict
    return Verdict.WRONG
