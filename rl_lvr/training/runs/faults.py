"""What can go wrong while rollouts are made and priced, and what is done about it. Docs: docs/grpo.md.

A fault that ends a run is found by all processes at the same place: one that waited for the others in a collective
operation would wait for ever. Faults inside a reward are dealt with in `rewards/call.py`.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import is_async_callable

from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import SpanStatus, find_spans
from rl_lvr.rollout.types import Rollout, StopReason
from rl_lvr.training.rewards.isolating import isolated

RULES = {"without_latents": "keep", "unclosed": "exclude", "empty": "exclude", "truncated": "keep"}
"""What is done with a rollout of each kind, unless `on_rollout` says otherwise.

Kept is what a reward can judge: an answer without latents, and one that ran into the limit. Left out is what holds no
answer: nothing at all, or a span that the limit cut, whose latents no text has ever read.
"""
_ACTIONS = ("keep", "exclude", "stop")
_log = logging.getLogger(__name__)


@dataclass
class LossSettings:
    """Mixin for the config of a trainer."""

    on_nan_loss: str = field(
        default="stop",
        metadata={
            "help": "A loss or gradient norm that is no finite number: stop, with a checkpoint of the step before, or "
            "skip this update."
        },
    )

    def check_faults(self) -> None:
        if self.on_nan_loss not in ("stop", "skip"):
            raise UserError(f"on_nan_loss is {self.on_nan_loss!r}; choose stop or skip.")


@dataclass
class RolloutSettings(LossSettings):
    """Mixin for the config of a trainer that makes rollouts."""

    on_rollout: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "keep, exclude or stop for each kind of rollout: without_latents (keep), unclosed (exclude), "
            "empty (exclude), truncated (keep)."
        },
    )
    engine_retries: int = field(
        default=0, metadata={"help": "How often an engine in another process is asked again after an error."}
    )
    max_idle_steps: int | None = field(
        default=None,
        metadata={"help": "Stop after so many generation batches in a row in which no group's rewards differ."},
    )

    def check_faults(self) -> None:
        super().check_faults()
        self.on_rollout = rules_of(self.on_rollout)
        if self.engine_retries < 0:
            raise UserError(f"engine_retries is {self.engine_retries}; it must be 0 or more.")
        if self.max_idle_steps is not None and self.max_idle_steps < 1:
            raise UserError(f"max_idle_steps is {self.max_idle_steps}; it must be at least 1.")


def rules_of(given: dict[str, str] | str | None) -> dict[str, str]:
    """`RULES` with the changes of a recipe, or of a flag in JSON."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UserError(f'on_rollout is {given!r}; write it as JSON: {{"empty": "keep"}}.') from error
    if given is not None and not isinstance(given, dict):
        raise UserError(f"on_rollout is {given!r}; it must be a mapping of kinds to keep, exclude or stop.")
    for kind, action in (given or {}).items():
        if kind not in RULES:
            raise UserError(f"on_rollout holds {kind!r}; choose from {', '.join(RULES)}.")
        if action not in _ACTIONS:
            raise UserError(f"on_rollout of {kind} is {action!r}; choose {', '.join(_ACTIONS)}.")
    return RULES | (given or {})


def kinds_of(rollout: Rollout, markers: FormatIds) -> list[str]:
    """Which of the kinds in `RULES` a completion is; it may be several."""
    begin = len(rollout.prompt_ids)
    spans = [span for span in find_spans(rollout.ids, markers).spans if span.stop > begin]
    said = len(rollout.completion_ids) - (rollout.stop_reason is StopReason.EOS)
    found = {
        "without_latents": not any(position >= begin for position in rollout.latent_positions),
        "unclosed": any(span.status is SpanStatus.TRUNCATED for span in spans),
        "empty": said <= 0,
        "truncated": rollout.stop_reason is StopReason.LENGTH,
    }
    return [kind for kind in RULES if found[kind]]


@dataclass(frozen=True)
class Sorted:
    """The rollouts of one process."""

    kinds: list[list[str]]
    excluded: list[bool]

    def count(self, kind: str) -> int:
        return sum(kind in kinds for kinds in self.kinds)


def sort_rollouts(rollouts: Sequence[Rollout], markers: FormatIds, rules: dict[str, str]) -> tuple[Sorted, str | None]:
    """What is kept and what is left out; and, where a rule says stop, the reason."""
    kinds = [kinds_of(rollout, markers) for rollout in rollouts]
    excluded = [any(rules[kind] == "exclude" for kind in row) for row in kinds]
    stops = [(row, kind) for row, found in enumerate(kinds) for kind in found if rules[kind] == "stop"]
    problem = None
    if stops:
        row, kind = stops[0]
        problem = f"completion {row} is {kind}, and on_rollout says stop for {len(stops)} of {len(kinds)} completions"
    return Sorted(kinds, excluded), problem


def watched(reward: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    """A reward whose exceptions wait in `errors` until all processes can agree on them.

    It is given its own copies of its arguments, unless a guard around it sees to that.
    """
    own = dict if hasattr(reward, "guarded_reward") else isolated
    named = functools.wraps(reward)

    def failed(error: Exception, columns: dict[str, Any]) -> list[None]:
        errors.append(error)
        return [None] * len(columns["completions"])

    if is_async_callable(reward):

        @named
        async def call_async(**columns: Any) -> Any:
            try:
                return await reward(**own(columns))
            except Exception as error:  # noqa: BLE001, raised again by the trainer
                return failed(error, columns)

        return call_async

    @named
    def call(**columns: Any) -> Any:
        try:
            return reward(**own(columns))
        except Exception as error:  # noqa: BLE001, raised again by the trainer
            return failed(error, columns)

    return call


class Idle:
    """Counts generation batches in a row that teach nothing: in every group all rewards are the same."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.count = 0
        self._warned = False

    def note(self, learns: bool) -> None:
        """`learns`: whether any advantage of any process is not zero."""
        self.count = 0 if learns else self.count + 1
        if self.most is not None and self.count >= self.most:
            raise Fault(
                f"in {self.count} generation batches in a row no group's rewards differed, so nothing was learned: "
                "look at them (rl-lvr rollouts show), raise temperature or num_generations, or raise max_idle_steps."
            )
        if self.count and not self._warned:
            self._warned = True
            _log.warning("no group's rewards differ in this generation batch, so it teaches nothing (said once)")


class Unopened:
    """Notices generation batches in a row in which no completion opened a span: latents are not trained then."""

    PATIENCE = 2
    """Batches."""

    def __init__(self) -> None:
        self._count = 0
        self._seen = False
        self._said: set[bool] = set()

    def note(self, rate: float) -> str | None:
        """What to say about `latent/rate` of a batch, over all processes; each of two sentences comes once."""
        self._count = 0 if rate > 0 else self._count + 1
        self._seen = self._seen or rate > 0
        if self._count < self.PATIENCE or self._seen in self._said:
            return None
        self._said.add(self._seen)
        what = "the model no longer starts a latent span" if self._seen else "the model never starts a latent span"
        return (
            f"{what}: latent/rate was 0 in {self._count} generation batches in a row, so no latent takes part in the "
            "training. Begin with a checkpoint that latent SFT has taught to open spans, raise temperature, or reward "
            "answers with latents (on_rollout: {without_latents: stop} ends such a run)."
        )
