"""From a completion to its answer, and whether it is the reference: the one rule of rewards and evaluation.

Free of torch. Of rl_lvr nothing else is imported here.
"""

from rl_lvr.answers.extraction import Source, boxed, boxes, extract
from rl_lvr.answers.matching import Kind, Match, correct, kind_of, match, matches
from rl_lvr.answers.plain import text_of
from rl_lvr.answers.verdict import Verdict

__all__ = [
    "Kind",
    "Match",
    "Source",
    "Verdict",
    "boxed",
    "boxes",
    "correct",
    "extract",
    "kind_of",
    "match",
    "matches",
    "text_of",
]
