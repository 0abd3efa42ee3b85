"""The rewards of paper B (2605.18641) to the letter of its released code, beside ours, which differ.

What the paper itself says of them is known from its abstract alone: later text is to interact with the latents. Each
docstring names the file of the code that it follows. Whether an answer is right is decided by our matcher; the authors
use mathruler and, where that says no, a language model. Their total is in docs/rewards.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rl_lvr.answers import Kind, Source, correct

from .necessity import weighed

_AROUND = re.compile(r"\s*(<|>|/)\s*")
_BOX = re.compile(r"\\boxed\{.*?\}", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>")


@dataclass(frozen=True)
class PaperBAttention:
    """Paper B's r_attn to the letter (`dp_actor.py`): layer 0, all heads, no gate, whole completion if no text follows.

    `relative` divides it by the mass on the image, and leaves it as it is where that is 0. `per: token` adds each
    query's mass at its own token. Ours, `attention`, is 0 without text behind the last span, and its `relative` without
    an image.
    """

    relative: bool = False
    per: Literal["completion", "token"] = "completion"

    def __post_init__(self) -> None:
        if self.relative and self.per == "token":
            raise ValueError("relative and per: token exclude each other; choose one.")

    @property
    def column(self) -> str:
        if self.relative:
            return "attention_relative_paper_b"
        return "attention_mass_paper_b" + ("_per_token" if self.per == "token" else "")

    @property
    def signals(self) -> list[Any]:
        if self.per == "token":
            return [{"attention_mass_paper_b": {"per": "token", "name": self.column}}]
        return [self.column]

    def __call__(self, **columns: Any) -> list[float]:
        return [sum(v) if self.per == "token" else v for v in columns[self.column]]


def paper_b_presence(markers: Sequence[Sequence[str]], *, value: float = 0.5, **_: Any) -> list[float]:
    """Paper B's flat bonus to the letter (`ray_trainer.py`): `value` if anywhere more STARTs than ENDs were read.

    That holds for an unclosed span, an empty one, and a START in the prompt. Ours, `presence`, asks for a closed span
    with a latent. The code looks for Monet's token ids whatever the model; here they are those of the format.
    """
    values = []
    for row in markers:
        depth = most = 0
        for marker in row:
            depth += 1 if marker == "start" else -1
            most = max(most, depth)
        values.append(value if most > 0 else 0.0)
    return values


class PaperBLength:
    """Paper B's price on length to the letter: `per_token` per token beyond the run's shortest right answer so far.

    Of the same question (`id`), and as it was looked up before this batch was judged (`vllm_rollout_spmd.py`); 0 for a
    question that was never answered rightly before, so always in a first epoch. `this_batch` also counts the right
    answers of the batch itself. Ours, `length_excess`, compares within the group.
    """

    def __init__(
        self, *, per_token: float = -0.001, this_batch: bool = False, kind: Kind = "auto", source: Source = "any"
    ) -> None:
        self.per_token, self.this_batch, self.kind, self.source = per_token, this_batch, kind, source
        self._shortest: dict[str, int] = {}
        self._found: dict[str, int] = {}

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str | None],
        id: Sequence[Any],  # noqa: A002, the column's name
        **_: Any,
    ) -> list[float]:
        questions, lengths = [str(one) for one in id], [len(ids) for ids in completion_ids]
        for question, length, right in zip(
            questions, lengths, correct(completions, answer, self.kind, self.source), strict=True
        ):
            if right:
                self._found[question] = min(length, self._found.get(question, length))
        known = self._shortest
        if self.this_batch:
            known = _shorter(self._shortest, [self._found])
        excess = [max(0, n - known.get(question, n)) for question, n in zip(questions, lengths, strict=True)]
        return [self.per_token * tokens if tokens else 0.0 for tokens in excess]

    def state_dict(self) -> dict[str, Any]:
        return {"shortest": self._shortest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._shortest, self._found = dict(state["shortest"]), {}

    def pending(self) -> dict[str, int]:
        found, self._found = self._found, {}
        return found

    def merge(self, parts: Sequence[Mapping[str, int]]) -> None:
        self._shortest = _shorter(self._shortest, parts)


def paper_b_necessity(
    completions: Sequence[Any],
    answer: Sequence[str | None],
    necessity_continuations: Sequence[str | None],
    *,
    value: float = 1.0,
    kind: Kind = "auto",
    source: Source = "any",
    **_: Any,
) -> list[float | None]:
    """Paper B's latent necessity to the letter (`latent_necessity.py`): the continuation after an empty pair is judged.

    `value` if right with latents and wrong without, -0.5 `value` if right both times or only without, 0 if wrong both
    times, and 0 where no span was closed by an END, a truncated one too. Ours, `necessity`, judges the whole text of
    the second rollout, and counts truncated spans.
    """
    return weighed(completions, necessity_continuations, answer, value, kind, source)


def paper_b_format(texts: Sequence[str], spans: Sequence[Sequence[Any]], **_: Any) -> list[float]:
    r"""Paper B's "format" to the letter (`monet_reward_function.py`): 1 for a \boxed{}, one <answer>, or 5 characters.

    Any box will do; else there must be exactly one <answer>...</answer> on one line, or a text of at most 5 characters
    without a latent span. Ours, `format`, also looks at the spans, and at what stands in the box.
    """
    values = []
    for raw, found in zip(texts, spans, strict=True):
        text = _AROUND.sub(r"\1", raw)
        short = len(text) <= 5 and not found  # the markers of a span are text there
        values.append(1.0 if _BOX.search(text) or len(_ANSWER.findall(text)) == 1 or short else 0.0)
    return values


def _shorter(known: Mapping[str, int], parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The least length of each question."""
    found = dict(known)
    for part in parts:
        for question, length in part.items():
            found[question] = min(length, found.get(question, length))
    return found
