"""The next token of every row in the reference engine: forced, decided between END and a latent, or drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.parts import Parts, Rows
from rl_lvr.rollout.spanstate import NOT_FORCED, SpanState
from rl_lvr.rollout.types import Request, Sampling, distorts, start_of

SCORES = 3
"""Of a chosen token: its log-prob, its log-prob before bias, penalty and cut, and the log of the kept mass."""


class Chooser:
    """Chooses the next token of every row of one batch."""

    def __init__(self, parts: Parts, requests: Sequence[Request], sampling: Sampling, rows: Rows) -> None:
        starts = [start_of(request, sampling) for request in requests]
        self._parts, self._markers, self._sampling = parts, parts.markers, sampling
        self._banned = torch.tensor(list(parts.markers.never_sampled), device=parts.device)
        self._bans_start = parts.markers.start is not None and bool(rows.no_start.any())
        self._biases = any(start.biased for start in starts)
        self._distorts = any(distorts(sampling, start) for start in starts)
        self._seen = (
            None
            if sampling.repetition_penalty == 1.0
            else draws.seen_tokens([list(r.prompt_ids) for r in requests], parts.vocabulary, parts.device)
        )
        """[B, V], what the repetition penalty remembers."""

    def __call__(
        self, hidden: Tensor, rows: Rows, state: SpanState, step: int, *, draws_any: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of every row, its `SCORES` [3, B], and whether it was forced.

        Args:
            hidden: [B, H], of the last position.
            step: Tokens that the rows have written so far.
            draws_any: Whether any row draws; otherwise the head is not needed.
        """
        markers, parts = self._markers, self._parts
        wanted = state.forced(markers) if parts.thinks else torch.full_like(rows.index, NOT_FORCED)
        if step == 0 and markers.start is not None:
            wanted = torch.where(rows.opens, markers.start, wanted)
        forced = wanted != NOT_FORCED
        if not draws_any:
            return wanted.where(forced, parts.pad), torch.zeros(SCORES, len(wanted), device=hidden.device), forced
        positions = rows.prompt + step
        greedy = self._sampling.temperature == 0.0
        raw = parts.head(hidden).float()
        logits = draws.ban(raw, self._banned)
        if self._bans_start:
            assert markers.start is not None
            logits = draws.ban_in_rows(logits, markers.start, rows.no_start)
        whole = logits
        if self._biases:
            assert markers.start is not None
            logits = draws.bias_in_rows(logits, markers.start, rows.bias)
        if self._seen is not None:
            logits = draws.penalise(logits, self._seen, self._sampling.repetition_penalty)
        warped = draws.warp(logits, self._sampling)
        token, logprobs = draws.draw(warped, rows.seeds, positions, greedy=greedy)
        scores = self._score(whole, warped, token, logprobs)
        if parts.thinks and markers.format.length == "free":
            assert markers.end is not None
            pair = draws.end_or_not(raw, markers.end)
            warped = draws.warp(pair, self._sampling)
            going_on, logprobs = draws.decide(warped, rows.seeds, positions, greedy=greedy)
            token = torch.where(state.inside, torch.where(going_on == 0, markers.end, markers.slot), token)
            scores = torch.where(state.inside, self._score(pair, warped, going_on, logprobs), scores)
        return torch.where(forced, wanted, token), scores.masked_fill(forced, 0.0), forced

    def _score(self, whole: Tensor, warped: Tensor, index: Tensor, logprobs: Tensor) -> Tensor:
        """`SCORES` of the chosen `index`: [3, B]."""
        if not self._distorts:
            return torch.stack((logprobs, logprobs, torch.zeros_like(logprobs)))
        before = draws.heat(whole, self._sampling.temperature)
        return torch.stack((logprobs, *draws.uncut(before, warped, index)))

    def note(self, token: Tensor) -> None:
        """Take over the tokens [B] that were written."""
        if self._seen is not None:
            self._seen.scatter_(1, token[:, None], True)

    def select(self, rows: Tensor) -> None:
        """Keep some rows only."""
        if self._seen is not None:
            self._seen = self._seen[rows]
