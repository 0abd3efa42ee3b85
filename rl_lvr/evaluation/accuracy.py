"""Accuracy under interventions: the same prompts answered with own, oracle, noise, ... latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.answers import Verdict, match
from rl_lvr.data.encoding import Collator, Encoded
from rl_lvr.data.targets import target_vectors
from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.text import completion_text
from rl_lvr.models import Family
from rl_lvr.rollout.conditions import run_condition
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling
from rl_lvr.signals import Collapse, between_samples, pooled
from rl_lvr.wrapping import input_embeddings


@dataclass(frozen=True)
class Scored:
    """One condition's answers."""

    rollouts: list[Rollout]
    texts: list[str]
    verdicts: list[Verdict]

    @property
    def right(self) -> list[bool]:
        return [verdict is Verdict.RIGHT for verdict in self.verdicts]

    @property
    def accuracy(self) -> float:
        """The share of all answers that are right; an unreadable one is not."""
        return sum(self.right) / len(self.right)

    @property
    def unreadable(self) -> float:
        """The share of completions out of which no answer can be read."""
        return sum(verdict is Verdict.UNREADABLE for verdict in self.verdicts) / len(self.verdicts)

    @property
    def collapse(self) -> Collapse | None:
        """How alike the latents of different records are (paper C); None without latents of two records."""
        held = [(number, pooled(r.latents)) for number, r in enumerate(self.rollouts) if len(r.latents)]
        if len(held) < 2:
            return None
        return between_samples(torch.stack([vector for _, vector in held]), [number for number, _ in held])


@dataclass(frozen=True)
class Answers:
    """What `AnswerSet.answer` found."""

    scored: dict[str, Scored]
    undefined: dict[str, str]
    """Conditions that these completions do not allow, and why: there is no latent to swap, say."""


class AnswerSet:
    """Prompts with known answers, ready to be answered again and again."""

    def __init__(
        self,
        encoded: Sequence[Encoded],
        answers: Sequence[str],
        family: Family,
        tokenizer: Any,
        batch_size: int = 64,
    ) -> None:
        self.encoded = encoded
        self.answers = list(answers)
        self.family = family
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.requests = [Request(prompt_ids=e.input_ids[: e.prompt_length].tolist(), images=e.images) for e in encoded]

    def __len__(self) -> int:
        return len(self.answers)

    def oracles(self, model: nn.Module) -> list[Tensor]:
        """The target vectors [k, H] of each record's completion, in order of position."""
        device = input_embeddings(model).weight.device
        collate = Collator([self.encoded], self.family, 0)
        found: list[Tensor] = []
        for start in range(0, len(self), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self)))
            batch = collate([{"index": i} for i in rows])
            targets = batch["targets"].to(device)
            images = {key: batch[key].to(device) for key in self.family.image_keys if key in batch}
            vectors, _ = target_vectors(self.family, model, images, targets)
            for row, index in enumerate(rows):
                mine = (targets.rows == row) & (targets.positions >= self.encoded[index].prompt_length)
                order = targets.positions[mine].argsort()
                found.append(vectors[mine][order].cpu())
        return found

    def score(self, rollouts: list[Rollout], markers: FormatIds) -> Scored:
        """Texts without spans and special tokens, and whether each gives the record's answer."""
        texts = [completion_text(r.completion_ids, self.tokenizer, markers).strip() for r in rollouts]
        verdicts = [match(text, answer).verdict for text, answer in zip(texts, self.answers, strict=True)]
        return Scored(rollouts, texts, verdicts)

    @torch.no_grad()
    def answer(
        self, engine: RolloutEngine, model: nn.Module, conditions: Sequence[Intervention], sampling: Sampling
    ) -> Answers:
        """Every condition on every prompt. Own latents are made once and serve the conditions built from them."""
        needs_own = {Intervention.OWN, Intervention.SWAP, Intervention.MEAN} & set(conditions)
        own = run_condition(engine, self.requests, sampling, Intervention.OWN) if needs_own else None
        oracles = self.oracles(model) if Intervention.ORACLE in conditions else None
        found = Answers({}, {})
        for condition in conditions:
            if condition is Intervention.OWN and own is not None:
                rollouts = own
            else:
                try:
                    rollouts = run_condition(
                        engine, self.requests, sampling, condition, oracles=oracles, answers=self.answers, own=own
                    )
                except UserError as error:
                    if condition not in (Intervention.SWAP, Intervention.MEAN):
                        raise
                    found.undefined[condition.value] = str(error)
                    continue
            found.scored[condition.value] = self.score(rollouts, engine.markers)
        return found
