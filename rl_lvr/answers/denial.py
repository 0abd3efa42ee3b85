"""What stands around something that is not meant: it is denied, excluded, or only supposed."""

from __future__ import annotations

import re

LOOKS_BACK = 100
"""Characters before an answer in which it may be denied."""
DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|if|whether|wrong|incorrect|false|except|than|without|unlike|excludes?|excluding|"
    r"eliminates?|eliminating|rejects?|rejecting|rules?\s+out|ruling\s+out|ruled\s+out|(?:all|anything|everything)\s+but|"
    r"instead\s+of|rather\s+than|hardly|cannot|unlikely|improbable|impossible|doubt(?:ful)?|opposite\s+of)|n['\u2019]t|\u4e0d\u662f|\u4e0d\u9009|\u5e76\u975e|\u6392\u9664|\u975e)"
    r"(?:\s+(?:the|that|this|it|is|be|a|an|case|correct|right|final|best|true|answer|option|choice|letter|number|exactly|"
    r"think|believe|say|guess|know|it's|really|actually|simply|choose|pick|select|equal|to))*[\s(\[:=*_\"'$]*$",
    re.IGNORECASE,
)
"""What stands before an answer that is not meant."""
REJECTED = re.compile(
    r"[)\]\"'*_$]*,?\s+(?i:(?:which\s+)?(?:is|are|was|were|seems?|looks?|can|cannot|could|would|does|must|has\s+to)"
    r"(?:n['\u2019]t)?\s+(?:clearly\s+|also\s+|definitely\s+)?(?:not|never|n['\u2019]t|be\s+ruled|be\s+excluded|wrong|incorrect|"
    r"false|a\s+distractor|out)\b)|\s*(?i:(?:is|can|would|does|could|was|are)n['\u2019]?t|cannot)\b|\s*(?:\u4e0d\u6b63\u786e|\u4e0d\u5bf9|\u9519\u8bef|\u662f\u9519)"
)
"""What follows an answer that is not meant."""
_REPLACED = re.compile(r"\bnot\s+(?:(?!\bbut\b)[^.;\n]){1,80}?,?\s+but\s+(?:rather\s+|instead\s+)?", re.IGNORECASE)
REFUSED = re.compile(
    r"(?:(?:i\s+(?:do\s+not|don't|can\s*not|can't|could\s+not|couldn't|am\s+not|am\s+unable|'m\s+not|have\s+no)|i'm\s+(?:not|unable|sorry)|"
    r"sorry|it\s+is\s+(?:not\s+possible|impossible|unclear)|cannot\s+(?:be\s+)?(?:determined?|say|tell|answer)|"
    r"can't\s+(?:be\s+)?(?:determined?|say|tell|answer)|unable\s+to|impossible\s+to\s+(?:tell|say|determine)|"
    r"there\s+is\s+not\s+enough|not\s+enough\s+information|no\s+(?:answer|idea)|\u4e0d\u77e5\u9053|\u65e0\u6cd5|\u5206\u304b\u308a\u307e\u305b\u3093)\b.{0,400}|"
    r"unknown|maybe|perhaps|possibly|not\s+sure|(?:it's|it\s+is)\s+(?:hard|difficult|impossible)\s+to\b.{0,100}|(?:it\s+)?depends|unclear|unsure|undetermined|unanswerable|indeterminate|n\s*/\s*a|none|null|nan|tbd|\?+|\.{2,}|-+|_+)",
    re.IGNORECASE | re.DOTALL,
)
"""A text that gives no answer."""


def replaced(text: str) -> str:
    """`text` without what it denies to say something else: "not red but blue" leaves "blue"."""
    return _REPLACED.sub("", text)


def denied(text: str, begin: int, end: int) -> bool:
    """Whether what stands in `text` from `begin` to `end` is denied before or after it."""
    before = text[max(0, begin - LOOKS_BACK) : begin]
    return bool(DENIED.search(before)) or bool(REJECTED.match(text, end))
