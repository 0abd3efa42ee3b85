"""From a completion to its answer, and whether it is the reference: the one rule of rewards and evaluation.

Free of torch. Nothing here imports the rest of rl_lvr.
"""

from rl_lvr.answers.matching import Kind, Source, boxed, correct, extract, text_of

__all__ = ["Kind", "Source", "boxed", "correct", "extract", "text_of"]
