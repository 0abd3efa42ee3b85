"""What an engine refuses before it runs anything: one clear sentence per fault, naming the request."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.spans import find_spans
from rl_lvr.latents.starting import LatentStart
from rl_lvr.rollout.spanstate import open_span
from rl_lvr.rollout.types import Request, start_of

_Need = Callable[[bool, str], None]


@dataclass(frozen=True)
class Limits:
    """What a model can take."""

    hidden_size: int
    vocabulary: int
    """Rows of the embedding."""
    max_positions: int
    image_token: int
    """-1 if the model takes text only."""
    special_ids: frozenset[int]
    """Ids that are no ordinary text: the tokenizer's special tokens and the end-of-sequence ids."""


def check_request(index: int | str, request: Request, markers: FormatIds, limits: Limits) -> None:
    """Raise UserError if `request`, number `index` of a call, cannot be run as it is written."""

    def need(ok: bool, fault: str) -> None:
        if not ok:
            raise UserError(f"request {index}: {fault}")

    ids = request.prompt_ids
    need(len(ids) > 0, "the prompt is empty; give at least one token.")
    need(
        len(ids) < limits.max_positions,
        f"the prompt has {len(ids)} tokens, the model takes {limits.max_positions} with its completion: "
        "shorten it, or use a smaller image.",
    )
    need(
        min(ids) >= 0 and max(ids) < limits.vocabulary,
        f"token id {max(ids) if min(ids) >= 0 else min(ids)} is not in the model's vocabulary of "
        f"{limits.vocabulary}: was the prompt made with another tokenizer?",
    )
    need(request.k is None or request.k > 0, f"k is {request.k}; it must be above 0.")
    need(
        request.k is None or request.k < limits.max_positions,
        f"k is {request.k}, and the model takes {limits.max_positions} positions in all: choose a smaller k.",
    )
    need(
        not starts_with_own(request, markers) or len(ids) > 1,
        "the prompt is a start token alone: its latent comes from the token before it, so put one there.",
    )
    tokens = list(ids).count(limits.image_token)
    if request.images:
        need(tokens > 0, "it has images but its prompt has no image token: build the prompt with the processor.")
    else:
        need(tokens == 0, f"the prompt has {tokens} image tokens but no image is given.")
    _check_intervention(request, markers, limits, need)
    _check_latent_start(request, markers, need)
    _check_prompt_latents(request, markers, limits, need)


def _check_intervention(request: Request, markers: FormatIds, limits: Limits, need: _Need) -> None:
    kind = request.intervention
    if markers.format.feedback == "none":
        need(
            kind in (Intervention.OWN, Intervention.NONE),
            f"latent format {markers.format.name!r} generates no latents, so {kind.value!r} would change nothing: "
            "change prompt_latents instead.",
        )
    if kind.needs_vectors:
        vectors = request.vectors
        if vectors is None or vectors.ndim != 2 or not len(vectors):
            need(False, f"intervention {kind.value!r} needs vectors of shape [n, {limits.hidden_size}], n at least 1.")
        else:
            _check_vectors(vectors, "vectors", limits, need)
    else:
        need(
            request.vectors is None,
            f"intervention {kind.value!r} takes no vectors; use 'given' to feed them.",
        )
    if kind in (Intervention.NONE, Intervention.PLAIN_TOKENS):
        need(
            open_span(request.prompt_ids, markers) is None,
            f"intervention {kind.value!r} but the prompt ends inside a latent span: cut it before its start token.",
        )
    if kind is Intervention.PLAIN_TOKENS:
        filler = request.filler_id
        if filler is None:
            need(False, "intervention 'plain_tokens' needs filler_id, the id of an ordinary token.")
        else:
            ordinary = 0 <= filler < limits.vocabulary and filler not in limits.special_ids
            ordinary = ordinary and filler not in (*markers.never_sampled, markers.start)
            need(ordinary, f"filler_id {filler} is no ordinary token: choose the id of a piece of plain text.")


def _check_latent_start(request: Request, markers: FormatIds, need: _Need) -> None:
    start = start_of(request)
    if not (start.forced or start.biased):
        return
    need(
        markers.format.feedback != "none",
        f"latent_start is {str(start)!r}, but latent format {markers.format.name!r} generates no latents: "
        "leave latent_start out.",
    )
    need(
        request.intervention is not Intervention.NONE,
        f"latent_start is {str(start)!r}, but intervention 'none' forbids START: "
        "give this request latent_start 'free'.",
    )


def _check_prompt_latents(request: Request, markers: FormatIds, limits: Limits, need: _Need) -> None:
    ids = request.prompt_ids
    given: Collection[int] = ()
    if request.prompt_latents is not None:
        vectors, given = request.prompt_latents
        given = [int(place) for place in given]
        need(
            vectors.ndim == 2 and len(vectors) == len(given),
            f"prompt_latents has vectors of shape {tuple(vectors.shape)} for {len(given)} positions.",
        )
        if len(vectors):
            _check_vectors(vectors, "prompt_latents", limits, need)
        need(list(given) == sorted(set(given)), "positions of prompt_latents must increase.")
        allowed = {markers.slot}
        if markers.format.first == "before_start" and markers.start is not None:
            allowed.add(markers.start)
        for place in given:
            need(
                0 <= place < len(ids) and ids[place] in allowed,
                f"prompt_latents has a vector for position {place}, where the prompt has no latent.",
            )
    if markers.format.feedback == "none" or not request.intervention.feeds_vectors:
        return  # a slot without a vector keeps its own, learned, embedding
    row = find_spans(ids, markers)
    if row.stray:
        need(False, f"the prompt has a slot or end token outside a latent span, at position {row.stray[0]}.")
    wanted = {p for span in row.spans for p in span.latent_positions(markers.format.first)}
    if starts_with_own(request, markers):
        wanted.discard(len(ids) - 1)
    missing = sorted(wanted - set(given))
    if missing:
        need(
            False,
            f"the prompt has a latent at position {missing[0]} ({len(missing)} in all) for which prompt_latents gives "
            "no vector: pass the vectors that an engine returned for them.",
        )


def opens_span(request: Request, start: LatentStart, markers: FormatIds) -> bool:
    """Whether the engine writes START as the first token of the completion: not where the prompt left a span open."""
    return start.forced and open_span(request.prompt_ids, markers) is None


def starts_with_own(request: Request, markers: FormatIds) -> bool:
    """Whether the prompt ends in a START whose own embedding the engine must replace (`before_start`)."""
    if markers.format.first != "before_start" or not request.intervention.feeds_vectors:
        return False
    last = len(request.prompt_ids) - 1
    given = () if request.prompt_latents is None else [int(p) for p in request.prompt_latents[1]]
    return open_span(request.prompt_ids, markers) == 1 and last not in given


def _check_vectors(vectors: torch.Tensor, what: str, limits: Limits, need: _Need) -> None:
    need(
        vectors.shape[-1] == limits.hidden_size,
        f"{what} are {vectors.shape[-1]} wide, the model is {limits.hidden_size}.",
    )
    need(bool(torch.isfinite(vectors).all()), f"{what} hold values that are not finite (NaN or infinity).")
