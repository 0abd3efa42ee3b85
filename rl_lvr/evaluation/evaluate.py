"""A plan's answers, judged and written down call by call; signals of the own latents; figures over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.evaluation.plan import Answered, Item, Plan
from rl_lvr.evaluation.questions import Question
from rl_lvr.evaluation.report import summarise
from rl_lvr.evaluation.rows import AnswerFile, Key, Row, Rule
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.text import completion_text
from rl_lvr.progress import task
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.rollout.types import RolloutEngine
from rl_lvr.signals import SignalSpec, between_samples, measure, pooled


@dataclass(frozen=True)
class Judge:
    """From a completion to its row."""

    tokenizer: Any
    markers: FormatIds
    rule: Rule

    def row(
        self, questions: Sequence[Question], answered: Answered, signals: dict[str, float | None] | None = None
    ) -> Row:
        question = questions[answered.item.question]
        text = completion_text(answered.rollout.completion_ids, self.tokenizer, self.markers).strip()
        extracted, right, rule = self.rule.judge(text, question.answer)
        return Row(
            id=question.id,
            condition=answered.item.condition.name,
            answer=question.answer,
            text=text,
            extracted=extracted,
            right=right,
            rule=rule,
            latents=len(answered.latents),
            cluster=question.group,
            category=question.category,
            seed=answered.rollout.seed,
            donor=None if answered.donor is None else questions[answered.donor].id,
            signals=signals or {},
        )


@dataclass(frozen=True)
class Signals:
    """What is measured on own latents, and the model that it is measured with."""

    specs: Sequence[SignalSpec]
    model: nn.Module
    markers: FormatIds
    batch_size: int

    def measure(self, answered: Sequence[Answered]) -> list[dict[str, float | None]]:
        """By name, for each answer; None where it has nothing to measure."""
        found: list[dict[str, float | None]] = []
        for start in range(0, len(answered), self.batch_size):
            rows = answered[start : start + self.batch_size]
            batch = replay_batch(self.model, [a.rollout for a in rows], [a.request.images for a in rows])
            columns = measure(self.model, batch, self.markers, self.specs).columns
            for row in range(len(rows)):
                named = {name: (column.values[row], column.counts[row]) for name, column in columns.items()}
                found.append(
                    {n: float(v) if count and isinstance(v, float) else None for n, (v, count) in named.items()}
                )
        return found


def evaluate(
    engine: RolloutEngine, plan: Plan, judge: Judge, file: AnswerFile, *, signals: Signals | None = None
) -> dict[str, Any]:
    """Answer what `file` lacks, write every answer into it, and return the figures over all (`report.summarise`).

    Args:
        engine: Whatever it is: it is given, and stays open.
        plan: Questions and conditions.
        judge: Of the plan's questions.
        file: Of this evaluation, perhaps with answers from before.
        signals: What to measure on own latents.
    """
    names = [question.id for question in plan.questions]
    file.begin()
    known = set(file.done)
    store = _Store(file)

    def done(item: Item) -> bool:
        return (names[item.question], item.condition.name, plan.seed(item)) in known

    items = plan.items()
    own = store.load(names, items, plan)
    left = sum(not done(item) for item in items)
    with task("answer", left, "answers") as bar:
        for answered in plan.run(engine, done=done, own=own):
            mine = [one for one in answered if one.item.condition.intervention is Intervention.OWN]
            values: dict[Item, dict[str, float | None]] = {}
            if signals is not None and mine:
                values = dict(zip([one.item for one in mine], signals.measure(mine), strict=True))
            store.save([(names[one.item.question], one) for one in mine])
            file.add([judge.row(plan.questions, one, values.get(one.item)) for one in answered])
            bar.advance(sum(not done(one.item) for one in answered))
    summary = summarise(file.rows, plan.undefined, [condition.name for condition in plan.conditions])
    for condition, collapse in store.collapse(names).items():
        summary["conditions"][condition].setdefault("signals", {})["collapse"] = collapse
    file.close(summary)
    return summary


def collapse_of(latents: Sequence[tuple[int, Tensor]]) -> float | None:
    """How alike the latents [n, H] of different questions are (paper C): None without latents of two questions."""
    held = [(number, pooled(vectors)) for number, vectors in latents if len(vectors)]
    if not held:
        return None
    found = between_samples(torch.stack([vector for _, vector in held]), [number for number, _ in held])
    return found.cosine if found.pairs else None


class _Store:
    """Own latents on disk, one file for each call: a swap takes them from questions that were answered before."""

    def __init__(self, file: AnswerFile) -> None:
        self.folder = file.latents_folder
        self._means: dict[Key, Tensor] = {}
        """Of the latents of every answer, [1, H], or [0, H] without any: what `collapse` compares."""

    def save(self, held: Sequence[tuple[str, Answered]]) -> None:
        if not held:
            return
        self.folder.mkdir(exist_ok=True)
        number = len(list(self.folder.glob("*.safetensors")))
        keys = [[name, one.item.condition.name, one.rollout.seed, len(one.latents)] for name, one in held]
        values = torch.cat([one.latents.cpu() for _, one in held])
        partial = self.folder / "partial"
        save_file({"latents": values.contiguous()}, partial, metadata={"keys": json.dumps(keys)})
        partial.replace(self.folder / f"{number:06}.safetensors")
        self._note(((name, one.item.condition.name, one.rollout.seed), one.latents.cpu()) for name, one in held)

    def load(self, names: Sequence[str], items: Sequence[Item], plan: Plan) -> dict[Item, Tensor]:
        """Of the plan's items, those that are there."""
        wanted = {
            (names[item.question], item.condition.name, plan.seed(item)): item
            for item in items
            if item.condition.intervention is Intervention.OWN
        }
        known = self._read()
        self._note(known.items())
        return {wanted[key]: vectors for key, vectors in known.items() if key in wanted}

    def collapse(self, names: Sequence[str]) -> dict[str, float | None]:
        """`collapse_of` the latents that were loaded and saved, by condition."""
        numbers = {name: number for number, name in enumerate(names)}
        held: dict[str, list[tuple[int, Tensor]]] = {}
        for (name, condition, _), mean in self._means.items():
            if name in numbers:
                held.setdefault(condition, []).append((numbers[name], mean))
        return {condition: collapse_of(latents) for condition, latents in held.items()}

    def _note(self, latents: Iterable[tuple[Key, Tensor]]) -> None:
        self._means |= {key: pooled(vectors)[None] if len(vectors) else vectors for key, vectors in latents}

    def _read(self) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as data:
                    keys = json.loads(data.metadata()["keys"])
                    vectors = data.get_tensor("latents").split([count for *_, count in keys])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}): delete it, and its answers are made again.") from error
            found |= {(name, condition, seed): v for (name, condition, seed, _), v in zip(keys, vectors, strict=True)}
        return found
