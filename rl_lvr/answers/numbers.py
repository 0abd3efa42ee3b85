"""Numbers and quantities in an answer: which one is meant, and whether it is the reference.

What only contains a number is another answer: 10^5 is not 10, 3x is not 3, and neither x > 5, 3 to 5 nor 3 + 2 is 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rl_lvr.answers.denial import denied, replaced
from rl_lvr.answers.extraction import STATED
from rl_lvr.answers.plain import LONGEST, bare
from rl_lvr.answers.units import Unit, read_unit

MOST = 400
"""Numbers that are read in one text."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:\u202f\d{3})+(?!\d)|\d{1,40})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{1,40}})?|\.\d{{1,40}})"
_EXPONENT = r"\{?\s?([-+]?\d{1,3})\s?\}?"
_VALUE = re.compile(
    rf"(?<!\d)(?<!\d\.)(?P<sign>(?<![\w)\]}}.])[-+](?=\s?[\d.$\\\u20ac\u00a3\u00a5])\s?|\b(?i:minus|negative)\s+)?"
    rf"(?P<currency>\\?[$\u20ac\u00a3\u00a5\u20b9]\s?)?(?P<inner>[-+](?=[\d.]))?"
    rf"(?:(?P<mixed>\d{{1,40}})(?:\s+(?P<mt>\d{{1,9}})/(?P<mb>\d{{1,9}})|\s*\\[dtc]?frac\s*\{{\s*(?P<fmt>\d{{1,9}})\s*\}}\s*\{{\s*(?P<fmb>\d{{1,9}})\s*\}})(?![\d.,]\d)"
    rf"|\\[dtc]?frac\s*(?:\{{\s*(?P<ft>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<fb>{_DECIMAL})\s*\}}|(?P<st>\d)\s?(?P<sb>\d))"
    rf"|(?P<number>{_DECIMAL})(?:(?:[eE](?P<e>[-+]?\d{{1,3}})(?![\w.]))|\s?(?:\*|\\times|\\cdot)\s?10\s?\^\s?(?P<ten>{_EXPONENT})"
    rf"|\s?(?:\^|\*\*)\s?(?P<power>{_EXPONENT})(?!\s?\^))?(?:\s?/\s?(?P<bottom>{_DECIMAL}))?)"
    rf"(?!\d|\.\d|,\d{{3}})"
)
_ABOUT = re.compile(r"^\s*(?:\u2248|about|approximately|around|roughly|circa|ca\.|nearly|almost|exactly|only)\s*", re.I)
_SCALE = re.compile(r"\s?(dozen|hundred|thousand|million|billion|trillion)s?\b", re.IGNORECASE)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<command>\\[A-Za-z]+)|(?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)|"
    r"(?P<sign>[-+*/=<>^_(){}\[\]|:\u2264\u2265\u2260\u2248\u00b1\u221e\u221a\\])|(?P<rest>.)",
    re.DOTALL,
)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_OF_FORMULAS = frozenset(["pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "oo", "inf", "infinity"])
_LATEX = [
    (re.compile(r"\\[%$]"), lambda m: m[0][1:]),
    (re.compile(r"\{,\}|(?<=\d)\\,(?=\d{3}(?!\d))|(?<=\d),\\!(?=\d{3})"), lambda _: ","),
    (re.compile(r"\\[,!]"), lambda _: " "),
    (
        re.compile(r"\s?\^\s?(?:\{\s?\\(?:circ|degree)\s?\}|\\(?:circ|degree)(?![A-Za-z]))|\\degree(?![A-Za-z])"),
        lambda _: "\u00b0",
    ),
    (re.compile(r"\\(?:approx|sim|simeq)(?![A-Za-z])"), lambda _: "\u2248"),
    (re.compile(r"\\(?:leq?|leqslant)(?![A-Za-z])|<="), lambda _: "\u2264"),
    (re.compile(r"\\(?:geq?|geqslant)(?![A-Za-z])|>="), lambda _: "\u2265"),
    (re.compile(r"\\lt(?![A-Za-z])"), lambda _: "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), lambda _: ">"),
    (re.compile(r"\\neq?(?![A-Za-z])"), lambda _: "\u2260"),
    (re.compile(r"\\pm(?![A-Za-z])"), lambda _: "\u00b1"),
]
_WEAK = re.compile(
    r"\b(?:is|are|was|were|equals?|gives?|makes?|gets?|got|yields?|becomes?|has|have|had|leaves?|so|thus|hence|therefore|totals?|total\s+of|"
    r"in\s+total|altogether|that's|it's|there's)\b|(?<!\d):(?!\d)|=>|->",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:\b(?:more|less|greater|fewer|larger|smaller|higher|lower|bigger|other|different)\s+than(?:\s+or\s+equal\s+to)?|"
    r"\bat\s+(?:least|most)|\b(?:over|under|above|below|beyond|up\s+to|exceeds|no\s+more\s+than|no\s+less\s+than|from|between))\s+"
    r"(?:about\s+)?[$(\[]*$",
    re.IGNORECASE,
)
_AND_UP = re.compile(
    r"\s*(?:\w+\s+)?(?:or\s+(?:more|less|fewer|higher|lower|above|below)|and\s+(?:up|above|below|(?:a|one)\s+(?:half|quarter|third)))\b|\s?\+(?!\s?\d)",
    re.IGNORECASE,
)
_OR = re.compile(
    r"\W*(?:or|\u6216|\u8fd8\u662f|/)(?:\s+(?:maybe|possibly|perhaps|even|about|is))*[\s$(\[]*", re.IGNORECASE
)
_TO = re.compile(r"\s*(?:-|\u2013|\u2014|~|to|through|until|\u5230|\u81f3)\s*", re.IGNORECASE)
_LIST = re.compile(r"\s*(?:,(?:\s*and)?|;|and|&|\u548c)\s*", re.IGNORECASE)
_GIVEN_FIRST = re.compile(r"(?:\s+[A-Za-z]+)?(?:[.,;(]\s|\s+(?:because|since|as)\b)", re.IGNORECASE)
"""After a number at the start of a text that is the answer, with reasons to follow."""
_NOUN = re.compile(r"\s*((?:[A-Za-z]+(?:\s+|$)){1,4})")
_NO_NOUN = re.compile(
    r"in|of|on|at|by|to|from|for|and|or|but|so|as|because|since|which|that|with|is|are|was|total|altogether",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """An exact number with its unit: a known one, or the words that follow it."""

    value: Fraction
    unit: Unit | None = None
    words: tuple[str, ...] = ()
    whole: bool = False
    """The text is this quantity and nothing else."""


@dataclass(frozen=True)
class Reading:
    """What a text gives as its number: a quantity, or an expression that is none (to be compared as mathematics)."""

    quantity: Quantity | None
    expression: str = ""


def read_quantity(text: str) -> Quantity | None:
    """`text` as one number with or without a unit, and nothing else: 1,234.5, 3/4, 5 cm, $5, 50%, 2\\times10^3."""
    return _whole(tidy(text).strip().rstrip(".").strip())


def read_number(text: str, formal: bool = False) -> Reading | None:
    """What `text` gives as its number; None where it gives none: no number, denied ones, or several to choose from.

    What is announced ("the answer is", "=", "so") comes first, else the last number counts.
    """
    text = replaced(tidy(text))
    if text.endswith("?"):
        return None
    whole = _whole(_ABOUT.sub("", text.strip().rstrip("." if formal else ".;,!").strip()))
    if whole is not None:
        return Reading(whole)
    runs = [run for run in _runs(text, formal) if _is_bound(text, run) or not denied(text, run.begin, run.end)]
    if not runs:
        return None
    chosen = _announced(text, runs)
    first = runs.index(chosen)
    reading = chosen.reading
    for other, left, right in ((first + 1, first, first + 1), (first - 1, first - 1, first)):
        if not 0 <= other < len(runs):
            continue
        between = text[runs[left].end : runs[right].begin]
        if _OR.fullmatch(between) and runs[other].reading != reading:
            return None
        if _TO.fullmatch(between) or _LIST.fullmatch(between):
            return Reading(None)
    return Reading(None) if _is_bound(text, chosen) else reading


def is_only_a_number(text: str) -> bool:
    """Whether `text` is a number, with or without a unit, and nothing else."""
    return read_quantity(text) is not None


def same_quantity(gold: Quantity, given: Quantity, tolerance: float) -> bool:
    """Whether `given` is `gold` within a relative tolerance. A unit that one of them lacks is forgiven, another unit is
    converted or wrong. 50% is 50 and 0.5.
    """

    def close(value: Fraction) -> bool:
        return abs(value - gold.value * size) <= Fraction(tolerance) * abs(gold.value * size)

    size = gold.unit.size if gold.unit else Fraction(1)
    if gold.unit and given.unit:
        return gold.unit.dimensions == given.unit.dimensions and close(given.value * given.unit.size)
    if gold.unit or given.unit:
        if gold.words or (gold.unit and given.words and given.whole):
            return False
        size = Fraction(1)
        unit = gold.unit or given.unit
        percent = unit is not None and unit.percent
        hundredth = Fraction(1, 100) if gold.unit is None else Fraction(100)
        return close(given.value) or (percent and close(given.value * hundredth))
    if gold.words and given.words and not {_stem(w) for w in gold.words} & {_stem(w) for w in given.words}:
        return False
    return close(given.value)


def _stem(word: str) -> str:
    return word.casefold().rstrip("s")


def tidy(text: str) -> str:
    """`bare(text)` with the LaTeX of numbers written plainly: percent, degrees, thousands, relations."""
    text = bare(text[-LONGEST:])
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    return text


def _whole(text: str) -> Quantity | None:
    while (
        len(text) > 2
        and text[0] + text[-1] in ("()", "[]", "{}", '""', "''")
        and not re.search(r"[()\[\]]", text[1:-1])
    ):
        text = text[1:-1].strip()
    if re.fullmatch(r"\d{1,3}(?: \d{3})+", text):
        text = text.replace(" ", "")
    found = _VALUE.match(text)
    if found is None:
        return None
    quantity = _quantity(text, found)
    if quantity is None:
        return None
    rest, end = text[quantity[1] :], quantity[1]
    words = re.fullmatch(r"\s+([A-Za-z]{2,20})(?:\s+([A-Za-z]{2,20}))?(?:\s+([A-Za-z]{2,20}))?", rest)
    if rest.strip() == "":
        return Quantity(quantity[0].value, quantity[0].unit, (), True)
    if (
        words
        and not any(_NO_NOUN.fullmatch(w) or w.casefold() in _OF_FORMULAS for w in words.groups() if w)
        and quantity[0].unit is None
    ):
        return Quantity(quantity[0].value, None, tuple(w for w in words.groups() if w), True)
    return None if end < len(text) else quantity[0]


def _quantity(text: str, found: re.Match[str]) -> tuple[Quantity, int] | None:
    """The quantity of a match of `_VALUE` with the unit behind it, and where it ends."""
    value = _value(found)
    if value is None:
        return None
    end = found.end()
    scale = _SCALE.match(text, end)
    if scale:
        value, end = value * _SCALES[scale[1].casefold()], scale.end()
    unit = read_unit(text, end)
    if unit is not None and not re.match(r"[A-Za-z0-9_^]", text[unit[1] :]):
        return Quantity(value, unit[0]), unit[1]
    sign = (found["currency"] or "").strip(" \\")
    known = read_unit(sign, 0) if sign else None
    return Quantity(value, known[0] if known else None), end


def _value(found: re.Match[str]) -> Fraction | None:
    def exact(digits: str) -> Fraction:
        return Fraction(re.sub(r"[,\u202f]", "", digits))

    if found["mixed"]:
        top, bottom = found["mt"] or found["fmt"], found["mb"] or found["fmb"]
        if not int(bottom):
            return None
        value = Fraction(found["mixed"]) + Fraction(int(top), int(bottom))
    elif found["number"] is None:
        over = exact(found["fb"] or found["sb"])
        if not over:
            return None
        value = exact(found["ft"] or found["st"]) / over
    else:
        value = exact(found["number"])
        if found["e"]:
            value *= Fraction(10) ** int(found["e"])
        elif found["ten"]:
            value *= Fraction(10) ** _exponent(found["ten"])
        elif found["power"]:
            if not value and _exponent(found["power"]) < 0:
                return None
            value **= _exponent(found["power"])
        if found["bottom"]:
            if not exact(found["bottom"]):
                return None
            value /= exact(found["bottom"])
    signs = (found["sign"] or "").strip().casefold(), found["inner"] or ""
    negative = (signs[0] in ("-", "minus", "negative")) != (signs[1] == "-")
    return -value if negative else value


def _exponent(text: str) -> int:
    return int(text.strip("{} "))


@dataclass(frozen=True)
class _Run:
    """A piece of text that is a formula: numbers, variables and signs without words between them."""

    begin: int
    end: int
    reading: Reading


def _runs(text: str, formal: bool) -> list[_Run]:
    found: list[_Run] = []
    begin, at, holds, end = -1, 0, False, 0

    def close() -> None:
        nonlocal begin, holds
        if begin >= 0 and holds:
            run = _read_run(text, begin, end)
            if run is not None:
                found.append(run)
        begin, holds = -1, False

    while at < len(text) and len(found) < MOST:
        value = _VALUE.match(text, at)
        if value is not None and value.end() > at:
            quantity = _quantity(text, value)
            begin = at if begin < 0 else begin
            at = end = value.end() if quantity is None else quantity[1]
            holds = True
            if formal and text[at : at + 1] == "!":
                at = end = at + 1
            continue
        token = _TOKEN.match(text, at)
        assert token is not None
        kind, word = token.lastgroup, token[0]
        after = text[token.end() : token.end() + 1]
        at = token.end()
        if kind == "space":
            if "\n" in word:
                close()
            continue
        alone = len(word) == 1 and not (word in "aAI" and (after.isspace() or not after))
        variable = (
            kind == "word"
            and not _CJK.search(word)
            and (alone or word in _OF_FORMULAS or after.isdigit() or text[token.start() - 1 : token.start()].isdigit())
        )
        colon = word == ":" and not (text[token.start() - 1 : token.start()].isdigit() and after.isdigit())
        if word == "(" and holds and not formal and text[token.start() - 1].isspace():
            close()  # a remark
        if kind == "command" or variable or (kind == "sign" and not colon):
            if begin < 0:
                begin = token.start()
            holds = holds or kind == "command" or word in _OF_FORMULAS or word in "\u221e\u221a"
            end = token.end()
            continue
        glued = (
            kind == "rest"
            and begin >= 0
            and text[end:at] == word
            and (after.isdigit() or (word == "," and text.count("(", begin, end) > text.count(")", begin, end)))
        )
        if glued or (
            word == ","
            and begin >= 0
            and text.count("(", begin, end) + text.count("[", begin, end)
            > text.count(")", begin, end) + text.count("]", begin, end)
        ):
            end = token.end()
            continue
        close()
    close()
    return found


def _read_run(text: str, begin: int, end: int) -> _Run | None:
    while (
        begin < end and (text[begin] in " )]}:*/|" or text[begin : begin + 2] == "- ") and not _VALUE.match(text, begin)
    ):
        begin += 1
    while begin < end and text[end - 1] in " ([{:=-*|\\/^_":
        end -= 1
    inside = text[begin:end]
    if not re.search(r"\d|\\[A-Za-z]|\u221e|\u221a|pi|inf|oo", inside):
        return None
    for opening, closing in ("()", "[]"):
        if inside.count(opening) > inside.count(closing) and inside.startswith(opening):
            begin, inside = begin + 1, inside[1:]
        if inside.count(closing) > inside.count(opening) and inside.endswith(closing):
            end, inside = end - 1, inside[:-1]
        if inside.count(opening) > inside.count(closing) and opening in inside:
            end = begin + inside.rindex(opening)
            inside = text[begin:end]
    members = [member.strip() for member in re.split(r"(?<![<>!:])=(?![>=])|\u2248", inside)]
    if len(members) > 1 and not re.search(r"[<>\u2264\u2265\u2260]", inside):
        for member in (members[-1], members[0]):
            quantity = _whole(member)
            if quantity is not None:
                return _Run(begin, end, Reading(_with_noun(quantity, text, end)))
        inside = members[-1] or inside
    quantity = _whole(inside.lstrip("\u2248= ").strip())
    if quantity is not None:
        return _Run(begin, end, Reading(_with_noun(quantity, text, end)))
    return _Run(begin, end, Reading(None, inside))


def _with_noun(quantity: Quantity, text: str, end: int) -> Quantity:
    noun = _NOUN.match(text, end) if quantity.unit is None and not quantity.words else None
    words: tuple[str, ...] = tuple(noun[1].split()) if noun else ()
    if words and _NO_NOUN.fullmatch(words[0]):
        words = ()
    return Quantity(quantity.value, quantity.unit, words)


def _is_bound(text: str, run: _Run) -> bool:
    """Whether the number only bounds what is meant: "more than 5", "5 or more"."""
    return bool(_BOUND.search(text[max(0, run.begin - 40) : run.begin]) or _AND_UP.match(text, run.end))


def _announced(text: str, runs: list[_Run]) -> _Run:
    for cue in (STATED, _WEAK):
        for found in reversed(list(cue.finditer(text))):
            after = [run for run in runs if run.end > found.end()]
            if after:
                return after[0]
    first = runs[0]
    return first if first.begin == 0 and _GIVEN_FIRST.match(text, first.end) else runs[-1]
