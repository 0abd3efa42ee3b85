"""A request as vLLM takes it, and vLLM's answer as a rollout, wherever that vLLM runs.

Nothing here imports vLLM: the client of a server needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.checks import check_request, starts_with_own
from rl_lvr.rollout.spanstate import open_span
from rl_lvr.rollout.types import Request, Rollout, Sampling, StopReason, Uncut, distorts, start_of
from rl_lvr.rollout.vllm import wire
from rl_lvr.rollout.vllm.prompts import collapse
from rl_lvr.rollout.vllm.settings import LatentSettings, check_room
from rl_lvr.rollout.vllm.slots import FED, FORCED


@dataclass(frozen=True)
class Answer:
    """What vLLM and its latent state say about one completion."""

    prompt_ids: Sequence[int]
    """As vLLM expanded them."""
    token_ids: Sequence[int]
    logprobs: Tensor
    """[C] float32."""
    finish_reason: str | None
    stop_reason: int | str | None
    vectors: Tensor
    """[n, H] in the model's precision, the latents that were generated; there may be more than were kept."""
    marks: Tensor
    """int8 by absolute position, see `slots`."""
    uncut: Uncut | None = None
    """Of a request whose sampling settings distort its distribution."""


def check(index: int, request: Request, settings: LatentSettings) -> None:
    """Raise UserError if request `index` cannot be run on vLLM as it is written."""
    check_request(index, request, settings.markers, settings.limits)
    try:
        check_room(request, settings)
    except UserError as error:
        raise UserError(f"request {index}: {error}") from error
    if request.images and not request.pictures:
        raise UserError(
            f"request {index} has images but no pictures: vLLM runs the image processor itself, so give the "
            "original images too (Request.pictures)."
        )
    if len(request.pictures) > 1 and settings.single_picture:
        raise UserError(
            f"request {index} has {len(request.pictures)} pictures: vLLM processes several images of this family "
            "differently from transformers, so give one per request."
        )
    if request.pictures and not request.images:
        raise UserError(f"request {index} has pictures but no images: give what the processor made of them too.")


def named(where: object, fault: str) -> str:
    """A worker's `fault` with the request that it belongs to; some name theirs already."""
    return fault if fault.startswith("request ") else f"request {where}: {fault}"


def checked_args(
    where: str,
    extra_args: dict[str, Any] | None,
    prompt: Sequence[int],
    seed: int,
    settings: LatentSettings,
    *,
    structured: bool = False,
) -> wire.LatentArgs:
    """What `extra_args` ask for at a prompt that vLLM has expanded; UserError, naming `where`, if impossible.

    `structured`: a grammar binds the output, and would lose its place at the first forced token.
    """
    limits, markers = settings.limits, settings.markers
    try:
        args = wire.decode(extra_args, prompt, seed, limits.hidden_size)
        check_room(args.request, settings)
    except UserError as error:
        raise UserError(f"request {where}: {error}") from error
    pictures = {"in vLLM": torch.empty(0)} if limits.image_token in prompt else {}
    check_request(where, replace(args.request, images=pictures), markers, limits)
    if starts_with_own(args.request, markers):
        raise UserError(
            f"request {where}: the prompt ends in a start token whose own embedding is a latent (before_start): leave "
            f"that token out and send {wire.OPENS} = 1."
        )
    if args.opens and not _may_open(args.request, settings):
        raise UserError(
            f"request {where}: {wire.OPENS} is for formats whose first latent comes before_start, prompts that end "
            "outside of a span, and interventions that feed vectors: leave it out."
        )
    if structured and args.request.intervention is not Intervention.NONE:
        raise UserError(
            f"request {where}: latents cannot be combined with structured outputs: send {wire.INTERVENTION} = 'none', "
            "or leave the structure out."
        )
    return args


def _may_open(request: Request, settings: LatentSettings) -> bool:
    """Whether the completion may be made to begin with a START whose latent is the model's own."""
    markers = settings.markers
    return (
        settings.thinks
        and markers.format.first == "before_start"
        and request.intervention.feeds_vectors
        and open_span(request.prompt_ids, markers) is None
    )


def prompt_ids(index: int, request: Request, settings: LatentSettings) -> list[int]:
    """One placeholder per image, and without a START that `latent_opens` will write."""
    ids = list(request.prompt_ids)
    if starts_with_own(request, settings.markers):
        ids.pop()
    if not request.pictures:
        return ids
    return collapse(index, ids, settings.limits.image_token, len(request.pictures), settings.frame)


def sampling_fields(
    request: Request, seed: int, sampling: Sampling, settings: LatentSettings, uid: str | None = None
) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams`. Text, numbers and lists only."""
    if sampling.noise != "gaussian":
        raise UserError(f"vLLM draws gaussian noise only, not {sampling.noise}: use the engine hf.")
    if sampling.sigma > wire.MOST_SIGMA:
        raise UserError(f"sigma is {sampling.sigma}; vLLM's workers take {wire.MOST_SIGMA:.0e} at most.")
    check_seed(seed)
    opens = starts_with_own(request, settings.markers)
    request = replace(request, latent_start=start_of(request, sampling))
    return {
        "max_tokens": min(sampling.max_tokens, settings.limits.max_positions) + opens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": min(sampling.top_k, settings.limits.vocabulary),
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": seed,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted({*settings.eos, *sampling.stop_token_ids}),
        "detokenize": bool(sampling.stop),
        "logprobs": 0,
        "extra_args": wire.encode(wire.LatentArgs(request, sampling.sigma, uid, opens)),
    }


def check_seed(seed: int) -> None:
    """vLLM takes -1 for "no seed", and would then draw other tokens every time."""
    if not 0 <= seed < wire.SEEDS:
        raise UserError(f"the seed {seed} cannot be used with vLLM: choose one from 0 to 2^63 - 1.")


def answer_of(
    output: Any, which: int, vectors: bytes, marks: bytes, uncut: bytes, dtype: torch.dtype, width: int
) -> Answer:
    """Completion `which` of vLLM's RequestOutput, with its latents and marks as the worker sends them."""
    completion = output.outputs[which]
    tokens = list(completion.token_ids)
    rows = [] if completion.logprobs is None else zip(completion.logprobs, tokens, strict=True)
    return Answer(
        prompt_ids=output.prompt_token_ids,
        token_ids=tokens,
        logprobs=torch.tensor([row[token].logprob for row, token in rows], dtype=torch.float32),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        vectors=vectors_of(vectors, dtype, width),
        marks=marks_of(marks)[: len(output.prompt_token_ids) + len(tokens)],
        uncut=uncut_of(uncut, len(tokens)),
    )


def rollout_of(
    index: int, request: Request, seed: int, sampling: Sampling, settings: LatentSettings, answer: Answer
) -> Rollout:
    """What request `index` became."""
    opens = int(starts_with_own(request, settings.markers))
    prompt = list(request.prompt_ids)
    first = len(prompt) - opens
    if list(answer.prompt_ids) != prompt[:first]:
        raise UserError(
            f"request {index}: vLLM's image processor makes {len(answer.prompt_ids)} prompt tokens of its pictures, "
            f"the request has {len(prompt)}: build prompt_ids and images with the checkpoint's own processor from "
            "these pictures, one row at a time."
        )
    tokens = list(answer.token_ids)
    marks = answer.marks[: first + len(tokens)]
    places = (marks & FED).nonzero()[:, 0].tolist()
    vectors = answer.vectors[: len(places)]
    if request.prompt_latents is not None:
        given, where = request.prompt_latents
        vectors = torch.cat([given.to("cpu", vectors.dtype), vectors])
        places = [*(int(place) for place in where), *places]
    own = settings.thinks and request.intervention is Intervention.OWN
    start = start_of(request, sampling)
    if distorts(sampling, start) and answer.uncut is None:
        raise RuntimeError(f"request {index}: no log-probs before the cut came back with its tokens.")
    return Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=tuple(tokens[opens:]),
        logprobs=answer.logprobs[opens:],
        forced=(marks[len(prompt) :] & FORCED) > 0,
        latents=vectors,
        latent_positions=tuple(places),
        stop_reason=_stop_reason(answer),
        seed=seed,
        sigma=sampling.sigma if own else 0.0,
        intervention=request.intervention,
        uncut=None if answer.uncut is None else answer.uncut[opens:],
        latent_start=start,
    )


def vectors_of(data: bytes, dtype: torch.dtype, width: int) -> Tensor:
    """Latents as a worker sends them -> [n, width]."""
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(-1, width)


def marks_of(data: bytes) -> Tensor:
    """Marks as a worker sends them -> [positions] int8."""
    return torch.from_numpy(np.frombuffer(data, np.int8).copy())


def uncut_to_bytes(uncut: Uncut) -> bytes:
    """The inverse of `uncut_of`."""
    return torch.stack((uncut.logprobs, uncut.log_kept_mass), -1).numpy().astype("<f4").tobytes()


def uncut_of(data: bytes, tokens: int) -> Uncut | None:
    """What a worker sends about the distribution before penalty and cut, of the first `tokens` of a completion."""
    if not data:
        return None
    pairs = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, 2)[:tokens])
    return Uncut(pairs[:, 0].contiguous(), pairs[:, 1].contiguous())


def _stop_reason(answer: Answer) -> StopReason:
    if answer.finish_reason == "length":
        return StopReason.LENGTH
    if answer.finish_reason == "stop":
        return StopReason.STOP if isinstance(answer.stop_reason, str) else StopReason.EOS
    raise RuntimeError(f"vLLM ended a request with {answer.finish_reason!r}.")
