"""Conditions of an evaluation: what is fed in place of a model's own latents, and from whom it comes.

The only place that chooses donors and means. An engine is only told which vectors to feed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rl_lvr.errors import UserError, near_miss
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.rollout.types import Request, Rollout, Sampling

DONATED = (Intervention.SWAP, Intervention.MEAN)
"""Made of the own latents of other rows."""
PIECE = 2048
"""Rows among which donors are assigned at a time."""


@dataclass(frozen=True)
class Condition:
    """An intervention under which every question is answered, and what is done to START in it."""

    intervention: Intervention = Intervention.OWN
    start: LatentStart | None = None
    """None: as the call of the engine says (`Sampling.latent_start`)."""

    @property
    def name(self) -> str:
        """Such as `own`, `noise/forced`, `own/bias=2.5`."""
        start = "" if self.start is None else f"/{self.start}".replace(" ", "=")
        return f"{self.intervention.value}{start}"

    @property
    def own(self) -> Condition:
        """The condition of the model's own latents that this one takes its donors from."""
        return Condition(start=self.start)

    def latent_start(self, sampling: Sampling) -> LatentStart:
        """What is done to START, in a call with this `sampling`. Without a block there is nothing to force or bias."""
        if self.intervention is Intervention.NONE:
            return FREE
        return sampling.latent_start if self.start is None else self.start

    @property
    def donated(self) -> bool:
        return self.intervention in DONATED

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From its name."""
        names = [kind.value for kind in Intervention if kind is not Intervention.GIVEN]
        word, slash, rest = (part.strip() for part in text.partition("/"))
        if word == Intervention.GIVEN.value:
            raise UserError("condition 'given' needs vectors of your own: feed them with rl-lvr generate --vectors.")
        if word not in names:
            hint = near_miss(word, names, f"; choose from {', '.join(names)}.")
            raise UserError(f"no condition {word!r}{hint}")
        if slash and word == Intervention.NONE.value:
            raise UserError(
                f"condition {text.strip()!r} makes no block, so nothing can be done to its START: write none."
            )
        return cls(Intervention(word), LatentStart.parse(rest) if slash else None)


def parse_conditions(text: str | Sequence[str]) -> list[Condition]:
    """Conditions from their names, separated by commas; each once."""
    words = text.split(",") if isinstance(text, str) else text
    return list(dict.fromkeys(Condition.parse(word) for word in words if word.strip()))


def with_own(conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions, with those of own latents before them that others are made of."""
    needed = [condition.own for condition in conditions if condition.donated]
    return list(dict.fromkeys([*needed, *conditions])) if set(needed) - set(conditions) else list(conditions)


# ---- vectors


def own_latents(request: Request, rollout: Rollout) -> Tensor:
    """[n, H]: the latents that the engine made itself, those that came with the prompt left out."""
    given = 0 if request.prompt_latents is None else len(request.prompt_latents[1])
    return rollout.latents[given:]


def mean_latents(latents: Sequence[Tensor]) -> Tensor:
    """[n, H]: vector i is the mean over all rows that have a latent number i."""
    longest = max(len(vectors) for vectors in latents)
    if not longest:
        raise UserError("no request made any latents, so there is nothing to average.")
    return torch.stack(
        [torch.stack([vectors[i].float() for vectors in latents if len(vectors) > i]).mean(0) for i in range(longest)]
    ).to(latents[0].dtype)


def filler_id(text: str, tokenizer: Any) -> int:
    """The token of `plain_tokens`, from its text."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"the filler {text!r} is {len(ids)} tokens: choose a text of exactly one.")
    return int(ids[0])


# ---- donors


def donors(
    made: Sequence[bool], answers: Sequence[Hashable], clusters: Sequence[Hashable] | None, seed: int
) -> list[int]:
    """Return for every row the row whose latents it gets.

    Rows with latents exchange theirs, each giving once. A row that made none gets those of any suitable row, should it
    open a span after all.

    Args:
        made: Whether each row made latents.
        answers: A donor has another one, where that is possible for all.
        clusters: A donor is of another one; None: every row is a cluster.
        seed: The same donors for the same seed.
    """
    clusters = list(range(len(answers))) if clusters is None else list(clusters)
    makers = [row for row, there in enumerate(made) if there]
    places = exchange([answers[row] for row in makers], [clusters[row] for row in makers], seed)
    found = {maker: makers[place] for maker, place in zip(makers, places, strict=True)}
    for row, answer in enumerate(answers):
        if row not in found:
            others = [maker for maker in makers if answers[maker] != answer and clusters[maker] != clusters[row]]
            others = others or [maker for maker in makers if clusters[maker] != clusters[row]]
            if not others:
                raise UserError(f"no request of another cluster than {clusters[row]!r} made latents.")
            found[row] = random.Random(f"{seed} {row}").choice(others)
    return [found[row] for row in range(len(answers))]


def exchange(answers: Sequence[Hashable], clusters: Sequence[Hashable], seed: int) -> list[int]:
    """For every place the place of its donor, each donor once, none of the same cluster.

    Donors of the same answer are as few as can be: none unless one answer makes up more than half of the places, or
    clusters leave no choice.
    """
    if not answers:
        raise UserError("no request made any latents, so there is nothing to exchange.")
    if len(answers) == 1:
        raise UserError("only one request made latents, so there is nobody to exchange them with.")
    if len(set(clusters)) == len(clusters) and 2 * max(Counter(answers).values()) <= len(answers):
        return derangement(answers, seed)
    cluster, most = Counter(clusters).most_common(1)[0]
    if 2 * most > len(clusters):
        raise UserError(
            f"{most} of {len(clusters)} requests with latents are of cluster {cluster!r}, more than half, so not every "
            "donor can be of another: give a more balanced set of requests."
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(answers))
    found = np.zeros(len(answers), dtype=int)
    for places in np.array_split(order, -(-len(order) // PIECE)):
        found[places] = places[_assigned(places, _codes(answers), _codes(clusters), generator)]
    if (_codes(clusters)[found] == _codes(clusters)).any():  # possible over all places, and not within a piece
        return _shifted(sorted(range(len(answers)), key=_codes(clusters).__getitem__), most)
    return [int(place) for place in found]


def _assigned(places: np.ndarray, answers: np.ndarray, clusters: np.ndarray, generator: np.random.Generator) -> Any:
    """The donor of each of `places`, among them: of another cluster if that can be, rarely of the same answer."""
    mine, kinds = clusters[places], answers[places]
    cost = (kinds[:, None] == kinds[None, :]) + (len(places) + 1.0) * (mine[:, None] == mine[None, :])
    return linear_sum_assignment(cost + generator.random(cost.shape) / (2 * len(places)))[1]


def derangement(answers: Sequence[Hashable], seed: int) -> list[int]:
    """For every place the place of its donor, each donor once, none with the same answer. The same for the same seed.

    Rows are laid out answer by answer and shifted by the size of the largest group: a group then always meets
    another one. That is possible exactly if no answer makes up more than half of the rows, which the caller checks.
    """
    most = max(Counter(answers).values())
    shuffle = random.Random(seed).shuffle
    groups = list(Counter(answers))
    shuffle(groups)
    order = []
    for group in groups:
        members = [place for place, value in enumerate(answers) if value == group]
        shuffle(members)
        order += members
    return _shifted(order, most)


def _shifted(order: Sequence[int], shift: int) -> list[int]:
    found = [0] * len(order)
    for i, place in enumerate(order):
        found[place] = order[(i + shift) % len(order)]
    return found


def _codes(values: Sequence[Hashable]) -> np.ndarray:
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values])
