"""Every question under every condition, in as few calls of an engine as there are dependencies.

Independent conditions go into one call, those of a question next to each other: an engine with a prefix cache computes
the prompt once, and batches are full. Swaps and means follow, once all own latents are there, from the last question to
the first: a cache without room for all prompts still holds the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.evaluation.conditions import Condition, donors, mean_latents, own_latents, with_own
from rl_lvr.evaluation.questions import Questions
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling

SAMPLE = 1 << 32
"""Between the seeds of two samples of a question."""


@dataclass(frozen=True)
class Item:
    """One answer that is wanted."""

    question: int
    condition: Condition
    sample: int = 0


@dataclass(frozen=True)
class Answered:
    """What became of an item."""

    item: Item
    request: Request
    rollout: Rollout
    donor: int | None = None
    """The question whose latents were fed."""

    @property
    def latents(self) -> Tensor:
        """[n, H], those that the engine fed."""
        return own_latents(self.request, self.rollout)


@dataclass
class Plan:
    """What to ask an engine for."""

    questions: Questions
    conditions: Sequence[Condition]
    sampling: Sampling
    samples: int = 1
    filler_id: int | None = None
    """The ordinary token of `plain_tokens`."""
    oracles: Callable[[Sequence[int]], Sequence[Tensor]] | None = None
    """Numbers of questions -> target vectors, for `oracle`."""
    at_once: int = 256
    """Answers in one call of the engine."""

    def __post_init__(self) -> None:
        self.conditions = with_own(self.conditions)
        self.undefined: dict[str, str] = {}
        """Conditions that the completions do not allow, and why: there is no latent to swap, say."""
        if self.samples < 1:
            raise UserError(f"samples is {self.samples}; it must be at least 1.")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise UserError("samples are equal at temperature 0: raise the temperature, or ask for one sample.")
        kinds = {condition.intervention for condition in self.conditions}
        if Intervention.ORACLE in kinds and self.oracles is None:
            raise UserError("condition 'oracle' needs the model's own vision tower: give the plan its oracles.")
        if Intervention.PLAIN_TOKENS in kinds and self.filler_id is None:
            raise UserError("condition 'plain_tokens' needs filler_id, the id of an ordinary token.")

    def seed(self, item: Item) -> int:
        """Conditions share it, so that they draw the same tokens up to the first latent."""
        return self.sampling.seed + item.question + item.sample * SAMPLE

    def items(self) -> list[Item]:
        """All that is wanted, question by question."""
        return [
            Item(question, condition, sample)
            for question in range(len(self.questions))
            for sample in range(self.samples)
            for condition in self.conditions
        ]

    def run(
        self,
        engine: RolloutEngine,
        *,
        done: Callable[[Item], bool] = lambda item: False,
        own: Mapping[Item, Tensor] | None = None,
    ) -> Iterator[list[Answered]]:
        """Yield answers call by call.

        Args:
            engine: Asked for at most `at_once` answers at a time, of whole questions where they fit.
            done: Items that are not wanted again. One with own latents is answered all the same where a swap or a
                mean needs its latents, and `own` lacks them.
            own: Own latents [n, H] that are known already.
        """
        latents = dict(own or {})
        wanted = [item for item in self.items() if not done(item)]
        second = [item for item in wanted if item.condition.donated]
        bases = {(item.condition.own, item.sample) for item in second}
        needed = {Item(row, *base) for base in bases for row in range(len(self.questions))}
        first = {item for item in wanted if not item.condition.donated} | (needed - latents.keys())
        place = {condition: number for number, condition in enumerate(self.conditions)}
        ordered = sorted(first, key=lambda item: (item.question, item.sample, place[item.condition]))
        for items in self._calls(ordered):
            answered = self._answer(engine, items, {})
            latents |= {one.item: one.latents.cpu() for one in answered if one.item in needed}
            yield answered
        given = self._donated(second, latents)
        for items in self._calls([item for item in reversed(second) if item in given]):
            yield self._answer(engine, items, given)

    def _calls(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Items in pieces of at most `at_once`; a question is not taken apart unless it alone is larger."""
        piece: list[Item] = []
        start = 0
        while start < len(items):
            stop = start
            while stop < len(items) and items[stop].question == items[start].question:
                stop += 1
            group = list(items[start:stop])
            if piece and len(piece) + len(group) > self.at_once:
                yield piece
                piece = []
            piece += group
            while len(piece) > self.at_once:
                yield piece[: self.at_once]
                piece = piece[self.at_once :]
            start = stop
        if piece:
            yield piece

    def _answer(
        self, engine: RolloutEngine, items: Sequence[Item], given: Mapping[Item, tuple[Tensor, int | None]]
    ) -> list[Answered]:
        rows = list(dict.fromkeys(item.question for item in items))
        prompts = dict(zip(rows, self.questions.requests(rows), strict=True))
        kinds = {item.question for item in items if item.condition.intervention is Intervention.ORACLE}
        oracles: dict[int, Tensor] = {}
        if kinds and self.oracles is not None:
            ordered = sorted(kinds)
            oracles = dict(zip(ordered, self.oracles(ordered), strict=True))
        requests = []
        for item in items:
            kind = item.condition.intervention
            vectors = oracles[item.question] if kind is Intervention.ORACLE else given.get(item, (None, None))[0]
            filler = self.filler_id if kind is Intervention.PLAIN_TOKENS else None
            prompt = prompts[item.question]
            requests.append(
                replace(
                    prompt,
                    seed=self.seed(item),
                    intervention=kind,
                    vectors=vectors,
                    filler_id=filler,
                    latent_start=item.condition.latent_start(self.sampling),
                )
            )
        rollouts = engine.generate(requests, self.sampling)
        return [
            Answered(item, request, rollout, given.get(item, (None, None))[1])
            for item, request, rollout in zip(items, requests, rollouts, strict=True)
        ]

    def _donated(self, items: Sequence[Item], latents: Mapping[Item, Tensor]) -> dict[Item, tuple[Tensor, int | None]]:
        """The vectors of swaps and means, and the question that they come from."""
        found: dict[Item, tuple[Tensor, int | None]] = {}
        for condition in dict.fromkeys(item.condition for item in items):
            for sample in range(self.samples):
                mine = [item for item in items if item.condition == condition and item.sample == sample]
                if not mine:
                    continue
                rows = [latents[Item(row, condition.own, sample)] for row in range(len(self.questions))]
                try:
                    if condition.intervention is Intervention.MEAN:
                        mean = mean_latents(rows)
                        found |= dict.fromkeys(mine, (mean, None))
                    else:
                        made = [len(vectors) > 0 for vectors in rows]
                        seed = self.sampling.seed + sample
                        whose = donors(made, self.questions.answers, self.questions.clusters, seed)
                        found |= {item: (rows[whose[item.question]], whose[item.question]) for item in mine}
                except UserError as error:
                    self.undefined[condition.name] = str(error)
        return found
