"""The latent state inside vLLM's Model Runner V2: what is forced, what is fed, what is remembered.

One step: `prepare_inputs_embeds` writes the latents over the embeddings; the model runs; `before_sampling` bans what
nobody may draw; vLLM samples, with the bias on START that a request asks for; `after_sampling` writes over the tokens
of spans and makes the next latents. A row is a request's place in the step's batch, a slot its place in the tables.
Nothing in a step waits for the device, and there is no loop over requests unless one brings latents in its prompt or
comes back from a preemption.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.spanstate import NOT_FORCED
from rl_lvr.rollout.types import Request, distorts, start_of
from rl_lvr.rollout.vllm import guards, wire
from rl_lvr.rollout.vllm.calls import checked_args
from rl_lvr.rollout.vllm.decisions import draw_pairs, uncut_pairs, warp_pairs
from rl_lvr.rollout.vllm.history import History, Live
from rl_lvr.rollout.vllm.sampler import LatentSampler, end_or_rest, score_uncut, write_over
from rl_lvr.rollout.vllm.settings import LatentSettings
from rl_lvr.rollout.vllm.slots import END, FED, FORCED, SLOT, START, SlotTables

logger = init_logger("vllm.rl_lvr")


@dataclass(frozen=True)
class _Planted:
    """Vectors that belong into a prefill: those of the prompt, and on a resumption the request's own."""

    positions: np.ndarray
    vectors: Tensor
    """[n, H] on the device."""
    end: int
    """Tokens of the prefill."""


@dataclass
class Counters:
    """What happened since the start, for tests and the self-test."""

    resumed: int = 0
    planted_rows: int = 0


class LatentModelState(DefaultModelState):
    """Forces SLOT and END, turns hidden states into latents, feeds them at the next step, keeps them."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        guards.check_embeddings(encoder_cache, self.model_config)
        self.settings: LatentSettings = model.latent_settings
        markers = self.settings.markers
        self.tables = SlotTables(self.settings, self.max_num_reqs, self.dtype, device)
        self.history = History(self.tables, self._overflow())
        self.counters = Counters()
        self.leaving: tuple[frozenset[str], frozenset[str]] | None = None
        """While the runner takes requests away: the finished and the preempted."""
        self._planted: dict[str, _Planted] = {}
        self._noisy: set[str] = set()
        self._supplied: set[str] = set()
        self._without_start: set[str] = set()
        self._biased: set[str] = set()
        self._distorted: set[str] = set()
        banned = set(markers.never_sampled)
        if markers.start is not None and not self.settings.thinks:
            banned.add(markers.start)
        self._never = torch.tensor(sorted(banned), dtype=torch.long, pin_memory=device.type == "cuda")
        self._banned = self._never.to(device, copy=True)
        self._pairs = torch.zeros(self.max_num_reqs, 2, device=device)
        self._uncut = torch.zeros(self.max_num_reqs, 2, device=device)
        self._slots: Tensor
        """Of the rows of this step."""
        logger.info(
            "Latents of format %r: %.1f MiB for %d requests x 2 x %d latents x %d (max_num_seqs, max_latents, width).",
            markers.format.name,
            self.tables.nbytes / 2**20,
            self.max_num_reqs,
            self.settings.max_latents,
            self.settings.limits.hidden_size,
        )

    def _overflow(self) -> str:
        room = self.settings.max_latents
        return f"it generated more than max_latents ({room}) latents: raise max_latents, or lower max_tokens or k."

    # ---- life of a request

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._banned.copy_(
            self._never, non_blocking=True
        )  # vLLM's deep sleep (level 2) throws away what the device held
        request_id, prompt_len = new_req_data.req_id, new_req_data.prompt_len
        ids = list(new_req_data.prefill_token_ids)
        sampling = new_req_data.sampling_params
        if sampling is None:
            return
        args, error = self._args(request_id, ids[:prompt_len], sampling)
        error = self._start(req_index, args, sampling, error)
        start = start_of(args.request)
        room = (sampling.max_tokens or self.max_model_len) + 1
        live = Live(
            slot=req_index,
            uid=args.uid,
            prompt=prompt_len,
            tokens=min(prompt_len + room, self.max_model_len + 1),
            latents=min(room, self.settings.max_latents),
            error=error,
            distorted=error is None and distorts(sampling, start),
        )
        if error is not None:
            logger.error("Ended: %s", error)
        self.history.live[request_id] = live
        self.tables.distorted[req_index] = live.distorted
        kind = args.request.intervention
        if args.sigma or kind in (Intervention.NOISE, Intervention.UNIT_NOISE):
            self._noisy.add(request_id)
        if args.request.vectors is not None:
            self._supplied.add(request_id)
        if self.settings.markers.start is not None and (start.forbidden or kind is Intervention.NONE):
            self._without_start.add(request_id)
        if start.biased:
            self._biased.add(request_id)
        if live.distorted:
            self._distorted.add(request_id)
        self._plant(request_id, live, args, ids)

    def _start(self, slot: int, args: wire.LatentArgs, sampling: Any, error: str | None) -> str | None:
        """Fill the tables of a slot; what is wrong with the request, if anything is. Raises nothing that a request can
        cause: vLLM would end with it."""
        if error is None:
            try:
                self.tables.add(slot, args, sampling, broken=False)
            except UserError as fault:
                error = str(fault)
        if error is not None:
            plain = wire.LatentArgs(Request(args.request.prompt_ids))
            self.tables.add(slot, plain, SamplingParams(), broken=True)
        return error

    def _args(self, request_id: str, prompt: list[int], sampling: Any) -> tuple[wire.LatentArgs, str | None]:
        """What the request asks for; if that is impossible, a harmless request and what is wrong."""
        # Without a seed of its own a request still needs one that is the same on every rank and after a preemption.
        seed = zlib.crc32(request_id.encode()) if sampling.seed is None else int(sampling.seed)
        extra = sampling.extra_args or {}
        try:
            structured = sampling.structured_outputs is not None
            return checked_args(request_id, extra, prompt, seed, self.settings, structured=structured), None
        except UserError as error:
            uid = extra.get(wire.UID)
            return wire.LatentArgs(Request(prompt, seed=seed), uid=None if uid is None else str(uid)), str(error)

    def _plant(self, request_id: str, live: Live, args: wire.LatentArgs, ids: list[int]) -> None:
        """Note what has to be written over the embeddings of this prefill."""
        places, vectors = [], []
        if live.error is None and args.request.prompt_latents is not None:
            given, where = args.request.prompt_latents
            vectors.append(given.to(self.device, self.dtype))
            places.append(np.asarray(where))
        parked = self.history.preempted.pop(request_id, None)
        if parked is not None:
            parked.wait()
            live.uid, live.error = parked.uid, parked.error
            own = self.tables.resume(live.slot, ids, live.prompt, parked.marks, parked.vectors)
            self.tables.broken[live.slot] = parked.broken.to(self.device)
            if parked.uncut is not None:
                done = slice(live.prompt, len(ids))
                self.tables.uncut[live.slot, done] = parked.uncut[done].to(self.device)
            vectors.append(self.tables.history[live.slot, : len(own)].clone())
            places.append(own.numpy())
            self.counters.resumed += 1
        if sum(map(len, places)):
            self._planted[request_id] = _Planted(np.concatenate(places), torch.cat(vectors), len(ids))

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._planted.pop(req_id, None)
        for requests in (self._noisy, self._supplied, self._without_start, self._biased, self._distorted):
            requests.discard(req_id)
        if self.leaving is not None:
            finished, preempted = self.leaving
            self.history.remove(req_id, preempted=req_id in preempted and req_id not in finished)
        elif req_id in self.history.live:  # a streaming session sends more input: its old part ends here
            self.history.remove(req_id, preempted=False)

    # ---- before the forward: embeddings

    def prepare_inputs_embeds(self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any) -> Tensor:
        """Write in place: the tensor is a view of the buffer that CUDA graphs read."""
        embeds = super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        if self.history.live:
            self._overlay(embeds, input_batch)
        return embeds

    def _overlay(self, embeds: Tensor, batch: Any) -> None:
        slots = batch.idx_mapping[: batch.num_reqs]
        rows = batch.query_start_loc[1 : batch.num_reqs + 1] - 1
        fed = torch.where(self.tables.feed[slots][:, None], self.tables.next_latent[slots], embeds[rows])
        embeds.index_copy_(0, rows.long(), fed)
        if self._planted:
            self._write_planted(embeds, batch)

    def _write_planted(self, embeds: Tensor, batch: Any) -> None:
        for row, request_id in enumerate(batch.req_ids):
            planted = self._planted.get(request_id)
            if planted is None:
                continue
            computed = int(batch.num_computed_tokens_np[row])
            begin, end = (int(x) for x in batch.query_start_loc_np[row : row + 2])
            low, high = np.searchsorted(planted.positions, [computed, computed + end - begin])
            if high > low:
                places = torch.from_numpy(planted.positions[low:high] - computed + begin).to(embeds.device)
                embeds[places] = planted.vectors[low:high]
                self.counters.planted_rows += int(high - low)
            if computed + end - begin >= planted.end:
                del self._planted[request_id]

    # ---- behind the forward: tokens and latents

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        return LatentSampler(sampler, self), None

    def before_sampling(self, logits: Tensor, batch: Any) -> None:
        """Ban what nobody may draw, in place; first take END's decision from the logits as they are."""
        markers, tables = self.settings.markers, self.tables
        slots = self._slots = batch.idx_mapping[: batch.num_reqs]
        if self.settings.thinks and markers.format.length == "free" and self.history.live:
            assert markers.end is not None
            end_or_rest(logits, tables.span.inside[slots], markers.end, self._pairs)
        logits.index_fill_(1, self._banned, float("-inf"))
        if self._without_start:
            logits[:, markers.start].masked_fill_(tables.no_start[slots], float("-inf"))

    def start_bias(self) -> Tensor | None:
        """What is added to START's logit in each row; None if nothing is in any."""
        return self.tables.start_bias[self._slots] if self._biased else None

    def after_filters(self, logits: Tensor, processed: Tensor, sampled: Tensor) -> None:
        """Between vLLM's draw and its log-probs: what the whole softmax says of the token, for those who need it."""
        if self._distorted:
            slots = self._slots
            temperature, wanted = self.tables.temperature[slots], self.tables.distorted[slots]
            score_uncut(logits, processed, temperature, wanted, sampled, self._uncut)

    def after_sampling(self, output: Any, batch: Any, prefill_len: Tensor) -> None:
        """Write over the tokens that are not vLLM's to choose, advance every span, make the next latents."""
        if not self.history.live:
            return
        slots = batch.idx_mapping[: batch.num_reqs].long()
        positions = batch.seq_lens[: batch.num_reqs].long()  # of the token that is chosen now
        active = positions >= prefill_len[slots]  # the others are in the middle of their prompts
        if self.settings.thinks:
            self._advance(output, slots, positions, active)
        if self._distorted:
            uncut = self._uncut[: len(slots)]
            self.tables.uncut[slots, positions] = torch.where(
                active[:, None], uncut, self.tables.uncut[slots, positions]
            )

    def _advance(self, output: Any, slots: Tensor, positions: Tensor, active: Tensor) -> None:
        markers, tables = self.settings.markers, self.tables
        assert markers.start is not None
        assert markers.end is not None

        span = tables.span.select(slots)
        wanted = torch.where(tables.opens[slots], markers.start, span.forced(markers))
        forced = wanted != NOT_FORCED
        sampled = output.sampled_token_ids[:, 0]
        drawn = torch.where(forced, wanted, sampled)
        logprobs = torch.zeros_like(positions, dtype=torch.float32)
        before = logprobs.new_zeros(len(slots), 2)
        written_over = forced
        if markers.format.length == "free":
            ending, pair_logprobs, pair_before = self._decide(slots, positions)
            decided = span.inside & ~forced
            drawn = torch.where(decided, torch.where(ending == 0, markers.end, markers.slot), drawn)
            logprobs = torch.where(decided, pair_logprobs, logprobs)
            before = torch.where(decided[:, None], pair_before, before)
            written_over = written_over | decided

        filled = span.plain & (forced | (drawn == markers.start))
        token = torch.where(filled, tables.filler[slots], drawn)
        forced = forced | filled
        counted = span.advance(drawn, markers)
        feed = counted & tables.feeds[slots] & active
        full = feed & (span.total > self.settings.max_latents)
        broken = tables.broken[slots] | full
        feed = feed & ~broken
        token = torch.where(broken, self.settings.eos[0], token)
        written_over = (written_over | filled | broken) & active
        uncut = self._uncut[: len(slots)]
        uncut.copy_(torch.where(written_over[:, None], before, uncut))

        marks = _kinds(drawn, markers) | FORCED * forced | FED * feed
        marks = torch.where(active, marks, tables.marks[slots, positions]).to(torch.int8)
        tables.marks[slots, positions] = marks
        own = feedback(self.model, self.model.latent_hidden)
        latents = tables.choose(
            own, slots, positions, span.total - 1, noise=bool(self._noisy), supplied=bool(self._supplied)
        )
        tables.next_latent.index_copy_(0, slots, latents)
        tables.feed[slots] = feed
        last = (span.total - 1).clamp(0, self.settings.max_latents - 1)
        tables.history[slots, last] = torch.where(feed[:, None], latents, tables.history[slots, last])
        tables.opens[slots] = tables.opens[slots] & ~active
        tables.broken[slots] = broken
        for name in ("inside", "fed", "total"):
            table = getattr(tables.span, name)
            table[slots] = torch.where(active, getattr(span, name), table[slots])
        write_over(output, written_over, token, logprobs)

    def _decide(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """END (0) or another latent (1) for every row, its log-prob, and what `Uncut` says of it. Only rows inside a
        span mean anything."""
        tables, pairs = self.tables, self._pairs[: len(slots)]
        temperature = tables.temperature[slots]
        warped = warp_pairs(pairs, temperature, tables.min_p[slots], tables.top_k[slots], tables.top_p[slots])
        index, logprobs = draw_pairs(warped, temperature == 0, tables.seeds[slots], positions)
        return index, logprobs, uncut_pairs(pairs, warped, temperature, index)


def _kinds(drawn: Tensor, markers: Any) -> Tensor:
    return START * (drawn == markers.start) + SLOT * (drawn == markers.slot) + END * (drawn == markers.end)


def watch_preemption() -> None:
    """Let latent states know which requests are preempted: vLLM removes those just as the finished ones."""
    original = GPUModelRunner.finish_requests
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        state = self.model_state
        if not isinstance(state, LatentModelState):
            return original(self, scheduler_output)
        state.leaving = (
            frozenset(scheduler_output.finished_req_ids),
            frozenset(scheduler_output.preempted_req_ids or ()),
        )
        try:
            return original(self, scheduler_output)
        finally:
            state.leaving = None

    GPUModelRunner.finish_requests = finish_requests
