"""Kinds of rollouts, and what is done with each: `on_rollout` of a recipe. Docs: docs/grpo.md."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.spans import SpanStatus, find_spans
from rl_lvr.rollout.types import Rollout, StopReason

RULES = {"without_latents": "keep", "unclosed": "exclude", "empty": "exclude", "truncated": "keep"}
"""What is done with a rollout of each kind, unless `on_rollout` says otherwise.

Kept is what a reward can judge: an answer without latents, and one that ran into the limit. Left out is what holds no
answer: nothing at all, or a span that the limit cut, whose latents no text has ever read.
"""
_ACTIONS = ("keep", "exclude", "stop")


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


def sort_rollouts(
    rollouts: Sequence[Rollout], markers: FormatIds, rules: dict[str, str]
) -> tuple[list[list[str]], list[bool], str | None]:
    """The kinds of each rollout, which of them are left out, and why to stop where a rule says so."""
    kinds = [kinds_of(rollout, markers) for rollout in rollouts]
    excluded = [any(rules[kind] == "exclude" for kind in row) for row in kinds]
    stops = [(row, kind) for row, found in enumerate(kinds) for kind in found if rules[kind] == "stop"]
    problem = None
    if stops:
        row, kind = stops[0]
        problem = f"completion {row} is {kind}, and on_rollout says stop for {len(stops)} of {len(kinds)} completions"
    return kinds, excluded, problem
