"""One batch through the reference engine: a prefill, then one decode step per token or latent for all rows.

Latents in a prompt enter through `latents.inject`, around the forward that also sees the images. A decode step has no
image, so there the vectors take the place of rows of the same embedding module's output and are passed on as
`inputs_embeds`. The hot loop has no Python loop over rows and one small transfer to the host per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_lvr.forward.batch import batch_images
from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import Positions
from rl_lvr.rollout.checks import starts_with_own
from rl_lvr.rollout.choosing import SCORES, Chooser
from rl_lvr.rollout.feeding import VectorSource
from rl_lvr.rollout.parts import Parts, Rows
from rl_lvr.rollout.spanstate import NOT_FORCED, SpanState
from rl_lvr.rollout.stops import StopStrings
from rl_lvr.rollout.types import Request, Rollout, Sampling, StopReason, Uncut, distorts, start_of


@dataclass(frozen=True)
class _Fed:
    """The vectors of one step, kept on the device until the batch is done."""

    index: Tensor
    positions: Tensor
    mask: Tensor
    values: Tensor


class BatchDecoder:
    """Completes one batch of requests: one call of `prefill`, then one of `run`.

    A batch holds either only prompts whose last token takes a vector of the model's own (`starts_with_own`) or none:
    the former are prefilled without that token, which is then the first decode step.
    """

    def __init__(
        self, parts: Parts, requests: Sequence[Request], seeds: Sequence[int], sampling: Sampling, stops: StopStrings
    ) -> None:
        markers, device = parts.markers, parts.device
        self._parts, self._markers, self._sampling = parts, markers, sampling
        self._requests, self._seeds = requests, seeds
        self._stops = stops
        self._thinks = parts.thinks
        self._opens = [starts_with_own(request, markers) for request in requests]
        if len(set(self._opens)) != 1:
            raise ValueError("a batch mixes prompts with and without an opening latent of their own.")

        self._rows = Rows.of(requests, seeds, sampling, parts)
        self._chooser = Chooser(parts, requests, sampling, self._rows)
        self._state = SpanState.of(requests, markers, device)
        self._source = VectorSource(requests, self._rows.seeds, sampling, parts.hidden_size, parts.dtype)
        self._ends = torch.tensor(sorted({*parts.eos, *sampling.stop_token_ids}), device=device)

        steps = int(self._rows.limit.max())
        shape = (len(requests), steps)
        self._steps = steps
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._scores = torch.zeros(SCORES, *shape, dtype=torch.float32, device=device)
        self._forced = torch.zeros(shape, dtype=torch.bool, device=device)
        self._length = torch.zeros(len(requests), dtype=torch.long, device=device)
        self._reasons = [StopReason.LENGTH] * len(requests)
        self._ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self._fed: list[_Fed] = []

        self._mask: Tensor  # [B, all tokens], set by the prefill like the three below
        self._width: int  # columns of the prefill
        self._positions: Positions
        self._cache: Any

    # ---- the loop

    def run(self, hidden: Tensor) -> list[Rollout]:
        """Decode from the prefill's `hidden` until every row is done, and put the rows together."""
        if self._opens[0]:
            hidden = self._open(hidden)
        draws_any = True
        for step in range(self._steps):
            drawn, scores, forced = self._chooser(hidden, self._rows, self._state, step, draws_any=draws_any)
            token = self._write(step, drawn, scores, forced)
            counted = self._state.advance(drawn, self._markers) if self._thinks else torch.zeros_like(forced)
            feed = counted & self._source.feeds & ~self._rows.done
            self._finish(step, token)
            running, feeds_any, draws_any = self._flags(feed)
            vectors = self._vectors(hidden, feed, self._rows.prompt + step) if feeds_any else None
            if not running:
                break
            if 2 * running <= len(token):
                kept = (~self._rows.done).nonzero()[:, 0]
                token, feed = token[kept], feed[kept]
                vectors = None if vectors is None else vectors[kept]
                self._compact(kept)
            hidden = self._step(token, vectors, feed)
        return self._rollouts()

    def _write(self, step: int, drawn: Tensor, scores: Tensor, forced: Tensor) -> Tensor:
        """Record a step. A block of `plain_tokens` is written as filler, START too, which is then no choice either."""
        rows = self._rows
        token = drawn
        if self._thinks:
            assert self._markers.start is not None
            filled = self._state.plain & (forced | (drawn == self._markers.start))
            token = torch.where(filled, rows.filler, drawn)
            scores = scores.masked_fill(filled, 0.0)
            forced = forced | filled
        self._tokens[rows.index, step] = token
        self._scores[:, rows.index, step] = scores
        self._forced[rows.index, step] = forced
        self._length[rows.index] += ~rows.done
        self._chooser.note(token)
        return token

    def _finish(self, step: int, token: Tensor) -> None:
        """Mark the rows that end with this token."""
        rows = self._rows
        ended = torch.isin(token, self._ends) & ~rows.done
        self._ended[rows.index] |= ended
        rows.done = rows.done | ended
        for row in self._stops.update(rows.index, token, rows.done):
            self._reasons[int(rows.index[row])] = StopReason.STOP
            rows.done[row] = True
        rows.done = rows.done | (step + 1 >= rows.limit)

    def _flags(self, feed: Tensor) -> tuple[int, bool, bool]:
        """Rows still running, whether any latent is fed, whether any row draws in the next step: the one transfer."""
        running = ~self._rows.done
        free = running
        if self._thinks:
            free = running & (self._state.forced(self._markers) == NOT_FORCED)
        count, feeds, frees = torch.stack((running.sum(), feed.sum(), free.sum())).tolist()
        return count, feeds > 0, frees > 0

    def _vectors(self, hidden: Tensor, feed: Tensor, positions: Tensor) -> Tensor:
        """What the latent positions of this step take, recorded as it will be fed. [B, H]"""
        own = feedback(self._parts.model, hidden)
        vectors = self._source(own, positions, self._state.total - 1)
        self._fed.append(_Fed(self._rows.index, positions, feed, vectors))
        return vectors

    def _compact(self, kept: Tensor) -> None:
        """Drop finished rows from everything that is carried along."""
        self._rows = self._rows.select(kept)
        self._state = self._state.select(kept)
        self._source.select(kept)
        self._mask = self._mask[kept]
        self._positions = self._positions.select(kept)
        self._cache.batch_select_indices(kept)
        self._chooser.select(kept)

    # ---- forwards

    def prefill(self) -> Tensor:
        """All prompts in one forward, padded on the left. Hidden state of the last position, [B, H]."""
        parts = self._parts
        cut = int(self._opens[0])
        prompts = [list(r.prompt_ids)[: len(r.prompt_ids) - cut] for r in self._requests]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), parts.pad)
        mask = torch.zeros(len(prompts), width + cut + self._steps, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, self._mask = ids.to(parts.device), mask.to(parts.device)
        self._width = width
        images = batch_images(parts.family, parts.model, [request.images for request in self._requests])
        self._positions = parts.family.positions(parts.model, ids, self._mask[:, :width], images)
        self._decoded = 0
        latents = self._prompt_latents([width - len(prompt) for prompt in prompts])
        entry = nullcontext() if latents is None else inject(parts.model, latents, self._markers)
        with entry:
            output = parts.core(
                input_ids=ids,
                attention_mask=self._mask[:, :width],
                position_ids=self._positions.prefill,
                use_cache=True,
                **images,
            )
        self._cache = output.past_key_values
        return output.last_hidden_state[:, -1]

    def _prompt_latents(self, offsets: list[int]) -> LatentBatch | None:
        given = [request.prompt_latents for request in self._requests]
        if not any(pair is not None and len(pair[1]) for pair in given):
            return None
        empty = torch.empty(0, self._parts.hidden_size)
        values = [empty if pair is None else pair[0] for pair in given]
        places = [() if pair is None else pair[1] for pair in given]
        batch = LatentBatch.from_rows([v.to(self._parts.device, self._parts.dtype) for v in values], places)
        return batch.shifted(torch.tensor(offsets))

    def _open(self, hidden: Tensor) -> Tensor:
        """Feed the START that ends the prompts, its embedding replaced by the first latent (`before_start`)."""
        assert self._markers.start is not None
        self._state.total += 1
        token = torch.full_like(self._rows.index, self._markers.start)
        feed = torch.ones_like(self._rows.done)
        return self._step(token, self._vectors(hidden, feed, self._rows.prompt - 1), feed)

    def _step(self, token: Tensor, vectors: Tensor | None, feed: Tensor) -> Tensor:
        """One decode forward of all rows. [B] -> [B, H]"""
        embeds = self._parts.embedding(token[:, None])
        if vectors is not None:
            embeds = torch.where(feed[:, None, None], vectors[:, None], embeds)
        positions = self._positions.decode(self._decoded)
        self._decoded += 1
        output = self._parts.core(
            inputs_embeds=embeds,
            attention_mask=self._mask[:, : self._width + self._decoded],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    # ---- results

    def _rollouts(self) -> list[Rollout]:
        tokens, scores, forced, lengths, ended = (
            tensor.cpu() for tensor in (self._tokens, self._scores, self._forced, self._length, self._ended)
        )
        values, places = self._completion_latents()
        rollouts = []
        for row, request in enumerate(self._requests):
            length = int(lengths[row])
            vectors, positions = values[row], places[row]
            if request.prompt_latents is not None:
                vectors = torch.cat([request.prompt_latents[0].to("cpu", self._parts.dtype), vectors])
                positions = [*(int(p) for p in request.prompt_latents[1]), *positions]
            own = request.intervention is Intervention.OWN and self._thinks
            start = start_of(request, self._sampling)
            logprobs, before, kept = scores[:, row, :length].clone()
            rollouts.append(
                Rollout(
                    prompt_ids=tuple(request.prompt_ids),
                    completion_ids=tuple(tokens[row, :length].tolist()),
                    logprobs=logprobs,
                    forced=forced[row, :length].clone(),
                    latents=vectors,
                    latent_positions=tuple(positions),
                    stop_reason=StopReason.EOS if ended[row] else self._reasons[row],
                    seed=self._seeds[row],
                    sigma=self._sampling.sigma if own else 0.0,
                    intervention=request.intervention,
                    uncut=Uncut(before, kept) if distorts(self._sampling, start) else None,
                    latent_start=start,
                )
            )
        return rollouts

    def _completion_latents(self) -> tuple[list[Tensor], list[list[int]]]:
        """Vectors [n, H] and absolute positions of every row, in the order in which they were fed."""
        count = len(self._requests)
        if not self._fed:
            none = torch.empty(0, self._parts.hidden_size, dtype=self._parts.dtype)
            return [none] * count, [[] for _ in range(count)]
        mask = torch.cat([fed.mask for fed in self._fed]).cpu()
        index = torch.cat([fed.index for fed in self._fed]).cpu()[mask]
        positions = torch.cat([fed.positions for fed in self._fed]).cpu()[mask]
        values = torch.cat([fed.values for fed in self._fed]).cpu()[mask]
        rows = [(index == row).nonzero()[:, 0] for row in range(count)]
        return [values[kept] for kept in rows], [positions[kept].tolist() for kept in rows]
