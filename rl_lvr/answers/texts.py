"""Whether a text gives the reference text: as a whole, or where it states one ("The answer is **red**.")."""

from __future__ import annotations

import re

from rl_lvr.answers.denial import DENIED, REFUSED, replaced
from rl_lvr.answers.extraction import STATED
from rl_lvr.answers.letters import lists_options
from rl_lvr.answers.plain import LONGEST, bare

PROSE = 8
"""Words beyond those of the reference from which on a text that announces no answer is taken for prose."""
_STRONG = ("\ue000", "\ue001")
_EMPHASISED = re.compile(
    rf"{_STRONG[0]}([^{''.join(_STRONG)}]+){_STRONG[1]}(?=\s*(?:[.,;:!)\u2014]|$|-\s|because\b|since\b|in\s+colou?r))"
)
"""Set bold at the end of a clause."""
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were)\b|\b(?:it|that|he|she|there|what)'s\b|\b(?:looks|seems|appears)\b(?:\s+to\s+be\b)?|"
    r"^[A-Za-z][A-Za-z ]{0,30}:(?=\s)|\u662f|\u306f)",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not|never|no|none|neither|nor|nobody|nothing|if|whether|cannot|without|hardly|unless|options|choices|candidates)\b|n't\b|\u4e0d|\u6ca1\u6709",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|finally|in\s+conclusion|overall|well|okay|ok|probably|likely|clearly|indeed|maybe|perhaps|"
    r"i\s+(?:would\s+)?(?:think|believe|guess|say|choose|pick|select|see|answer)|i'd\s+(?:say|guess)|i'll\s+say)\b[\s,:]*(?:that\s+)?|"
    r"(?:it's|it\s+is|that's|they're|they\s+are|he's|she's)\s+(?=\S))+",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\s*(?:[.;!\n](?:\s|$)|\s-+\s|\u2014|\(|,?\s+\b(?:because|since|as\s+(?:the|it|we|you|there|shown|seen)|rather\s+than|instead\s+of|and\s+not|but\s+not|"
    r"given\s+that)\b|,\s*(?:not|as|which|so|because|since|and\s+not)\b).*",
    re.IGNORECASE | re.DOTALL,
)
_LABEL = re.compile(r"\(?(?:[A-Za-z]|\d{1,2})[).:]\s+(?=\S)")
_LABELS = re.compile(r"(?<!\w)\(?[A-Za-z][).:]\s+(?=\S)")
_HEDGES = re.compile(
    r"\b(?:or|either)\b|\b(?:yes|true)\s*(?:and|/|,)\s*(?:no|false)\b|\u6216|\u8fd8\u662f|[\w]/[\w]|\bbetween\b|\?\s*$",
    re.IGNORECASE,
)
_PLACED = re.compile(r"(?:on|at|in|to|toward|towards)\s+(?:the\s+)?", re.IGNORECASE)
_POLAR = frozenset(("yes", "no", "true", "false"))
_POLAR_FIRST = re.compile(
    r"\W*(yes|no|true|false)(?:\s*[,.;:!\u2014]|\s+-|\s*$|\s+(?:because|since|it|there|the|this|that|he|she|they|i)\b)",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\S)")
_ROUND = " .,:;!?\"'()[]`*_"


def normalise(answer: str) -> str:
    """`answer` in one spelling: case, markup, surrounding punctuation, runs of white space, white space beside commas
    and brackets, hyphens between words and an article before them do not count.
    """
    text = " ".join(bare(answer[-LONGEST:]).casefold().split())
    text = re.sub(r"\s*,\s*", ", ", re.sub(r"(?<=[(\[{])\s+|\s+(?=[)\]}])", "", text))
    text = re.sub(r"(?<=[^\W\d_])[-_](?=[^\W\d_])", " ", text)
    return _ARTICLE.sub("", text.strip(_ROUND)) or text


def text_is(text: str, gold: str) -> bool | None:
    """Whether `text` gives the text `gold`; None if it gives none: it is empty or prose, declines, denies or hedges."""
    wanted = normalise(gold)
    strong = bare(text[-LONGEST:], _STRONG)
    whole = strong.replace(_STRONG[0], "").replace(_STRONG[1], "")
    if normalise(whole) == wanted:
        return True
    if not whole.strip(_ROUND) or REFUSED.fullmatch(whole.strip(" .!\"'")):
        return None
    stated, announced = _stated(strong, whole, wanted)
    if stated is None:
        return None
    if stated.rstrip().endswith("?"):
        return None
    for reading in _readings(stated):
        if normalise(reading) == wanted:
            return True
    rest = stated.strip()
    if wanted in _POLAR and _POLAR_FIRST.match(rest):
        return None if _HEDGES.search(rest) else normalise(_POLAR_FIRST.match(rest)[1]) == wanted  # type: ignore[index]
    cut = _CLOSING.sub("", rest)
    cut = cut if cut.strip(_ROUND) else rest
    if lists_options(whole) or REFUSED.fullmatch(cut.strip(" .!\"'")) or DENIED.match(cut) or _starts_denied(cut):
        return None
    if _HEDGES.search(cut) and not _HEDGES.search(wanted):
        return None
    if not announced and len(whole.split()) > len(wanted.split()) + PROSE:
        return None
    return False


def _starts_denied(text: str) -> bool:
    return (
        re.match(
            r"\W*(?:not|never|neither|nor|except|anything\s+but|it\s+is\s+not|it\s+isn't|isn't)\b|.*(?:\u4e0d\u662f|\u5e76\u975e|\u3067\u306f\u306a)",
            text,
            re.IGNORECASE,
        )
        is not None
    )


def _stated(strong: str, whole: str, wanted: str) -> tuple[str | None, bool]:
    """What the text states as its answer, and whether it announces it. None if it only denies."""
    cues = list(STATED.finditer(whole))
    if cues:
        before = whole[max(0, cues[-1].start() - 60) : cues[-1].start()]
        denial = re.search(
            r"\b(?:wrong|incorrect|if|whether|not\s+(?:the\s+case\s+)?that(?:\s+the)?|not\s+the)\s+(?:the\s+)?$",
            before,
            re.IGNORECASE,
        )
        return (None if denial else replaced(whole[cues[-1].end() :])), True
    spoken = replaced(whole)
    bold = {found[1].strip() for found in _EMPHASISED.finditer(strong) if not _denies_before(strong, found.start())}
    if len(bold) == 1:
        return bold.pop(), True
    opened = _OPENING.match(spoken)
    if _LABELS.match(spoken) or (wanted in _POLAR and _POLAR_FIRST.match(spoken[opened.end() if opened else 0 :])):
        return spoken[opened.end() if opened else 0 :], False
    copulas = list(_COPULA.finditer(_CLOSING.sub("", spoken), opened.end() if opened else 0))
    if len(copulas) == 1:
        denies = _DENIES.search(spoken[: copulas[0].start()])
        return (None if denies else spoken[copulas[0].end() :]), True
    return spoken[opened.end() if opened else 0 :], False


def _denies_before(text: str, at: int) -> bool:
    return DENIED.search(text[max(0, at - 60) : at]) is not None


def _readings(stated: str) -> list[str]:
    found = [stated, _CLOSING.sub("", stated)]
    opened = _OPENING.match(stated.lstrip())
    if opened:
        rest = stated.lstrip()[opened.end() :]
        found += [rest, _CLOSING.sub("", rest)]
    found += [_PLACED.sub("", text.strip()) for text in found]
    copulas = list(_COPULA.finditer(found[1]))
    if len(copulas) == 1 and not _DENIES.search(found[1][: copulas[0].start()]):
        found.append(found[1][copulas[0].end() :])
    for text in list(found):
        label = _LABEL.match(text.strip())
        if label and not _LABELS.search(text.strip(), label.end()):
            found.append(text.strip()[label.end() :])
            found.append(_CLOSING.sub("", found[-1]))
    return found
