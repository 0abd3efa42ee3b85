"""From a completion's text to its answer, and whether two answers agree.

Extraction moves results (docs/evaluation.md): the rule that found an answer is part of every result.
"""

from __future__ import annotations

import re

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def extract_answer(text: str) -> str:
    """The last `<answer>`, else the last `\\boxed{}`, else the last line that is not empty."""
    for pattern in (_TAG, _BOXED):
        found = pattern.findall(text)
        if found:
            return found[-1].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def normalise(answer: str) -> str:
    """Case, surrounding punctuation and runs of white space do not count."""
    return " ".join(answer.casefold().split()).strip(" .,:;!?\"'()[]")


def matches(text: str, answer: str) -> bool:
    """Whether the answer in a completion's text is `answer`."""
    return normalise(extract_answer(text)) == normalise(answer)
