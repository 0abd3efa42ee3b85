"""A request's latent part as `SamplingParams.extra_args`, and back.

Flat keys, and values that are text, a number or a list of numbers: an HTTP client (`vllm_xargs`) can send nothing
else. Vectors are base64 of little-endian float32. The request's seed is `SamplingParams.seed`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lvr.errors import UserError, near_miss
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.rollout.types import Request

Wire = dict[str, str | int | float | list[int]]

INTERVENTION = "latent_intervention"
START = "latent_start"
K = "latent_k"
SIGMA = "latent_sigma"
UID = "latent_uid"
FILLER = "latent_filler"
VECTORS = "latent_vectors"
PROMPT_VECTORS = "latent_prompt_vectors"
PROMPT_POSITIONS = "latent_prompt_positions"
OPENS = "latent_opens"
KEYS = (INTERVENTION, START, K, SIGMA, UID, FILLER, VECTORS, PROMPT_VECTORS, PROMPT_POSITIONS, OPENS)
_PREFIX = "latent_"

MOST = 2**30
"""Of every whole number but seeds: more than anybody needs, and little enough for the 32-bit tables of a worker, where
a number that does not fit would end the whole engine."""
MOST_SIGMA = 1e6
SEEDS = 2**63
"""A seed is below this; vLLM takes -1 for "no seed"."""


@dataclass(frozen=True)
class LatentArgs:
    """What a worker is told about one request."""

    request: Request
    """Its prompt, seed and intervention; images are not among it."""
    sigma: float = 0.0
    uid: str | None = None
    """Under which the latents are fetched afterwards. Without one they are dropped when the request ends."""
    opens: bool = False
    """The first token is START, forced, with a latent of the model's own (`before_start`): the prompt's own last token,
    which was left out of it. A START that `latent_start` forces needs no such mark."""


def encode(args: LatentArgs) -> Wire:
    """The `extra_args` of a request; defaults are left out."""
    request = args.request
    wire: Wire = {}
    if request.intervention is not Intervention.OWN:
        wire[INTERVENTION] = request.intervention.value
    if request.latent_start not in (None, FREE):
        wire[START] = str(request.latent_start)
    if request.k is not None:
        wire[K] = request.k
    if request.filler_id is not None:
        wire[FILLER] = request.filler_id
    if request.vectors is not None:
        wire[VECTORS] = to_text(request.vectors)
    if request.prompt_latents is not None and len(request.prompt_latents[1]):
        vectors, places = request.prompt_latents
        wire[PROMPT_VECTORS] = to_text(vectors)
        wire[PROMPT_POSITIONS] = [int(place) for place in places]
    if args.sigma:
        wire[SIGMA] = args.sigma
    if args.uid is not None:
        wire[UID] = args.uid
    if args.opens:
        wire[OPENS] = 1
    return wire


def decode(wire: Mapping[str, Any] | None, prompt_ids: Sequence[int], seed: int, hidden_size: int) -> LatentArgs:
    """The inverse of `encode`. Keys of others are left alone; a faulty value of ours is a UserError."""
    ours = {key: value for key, value in (wire or {}).items() if key.startswith(_PREFIX)}
    for key in ours:
        if key not in KEYS:
            hint = near_miss(key, KEYS, f": known are {', '.join(KEYS)}.")
            raise UserError(f"there is no latent setting {key!r}{hint}")
    request = Request(prompt_ids, seed=seed)
    if not ours:
        return LatentArgs(request)
    kind = ours.get(INTERVENTION, Intervention.OWN.value)
    if kind not in [known.value for known in Intervention]:
        raise UserError(f"{INTERVENTION} is {kind!r}; choose {', '.join(known.value for known in Intervention)}.")
    request = replace(
        request,
        intervention=Intervention(kind),
        latent_start=LatentStart.parse(ours[START]) if START in ours else None,
        k=_whole(ours, K),
        filler_id=_whole(ours, FILLER),
        vectors=_vectors(ours, VECTORS, hidden_size),
    )
    positions = ours.get(PROMPT_POSITIONS)
    vectors = _vectors(ours, PROMPT_VECTORS, hidden_size)
    if (positions is None) != (vectors is None):
        raise UserError(f"{PROMPT_VECTORS} and {PROMPT_POSITIONS} go together: give both or neither.")
    if vectors is not None and positions is not None:
        if not isinstance(positions, list) or not all(type(place) is int for place in positions):
            raise UserError(f"{PROMPT_POSITIONS} must be a list of whole numbers.")
        request = replace(request, prompt_latents=(vectors, positions))
    sigma = ours.get(SIGMA, 0.0)
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 <= sigma <= MOST_SIGMA:
        raise UserError(f"{SIGMA} is {sigma!r}; it must be 0 or more, at most {MOST_SIGMA:.0e}.")
    opens = ours.get(OPENS, 0)
    if not isinstance(opens, int) or opens not in (0, 1):
        raise UserError(f"{OPENS} is {opens!r}; it must be 0 or 1.")
    uid = ours.get(UID)
    return LatentArgs(request, float(sigma), None if uid is None else str(uid), bool(opens))


def to_text(vectors: Tensor) -> str:
    """[n, H] -> base64. float32 holds every bfloat16 and float16 number exactly."""
    return base64.b64encode(vectors.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes()).decode()


def from_text(text: str, hidden_size: int) -> Tensor:
    """base64 -> [n, H] float32."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"vectors must be base64 of little-endian float32 ({error}).") from error
    if not data or len(data) % (4 * hidden_size):
        raise UserError(f"vectors of {len(data)} bytes are no rows of {hidden_size} float32 numbers.")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, hidden_size))


def _whole(wire: Mapping[str, Any], key: str) -> int | None:
    value = wire.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST):
        raise UserError(f"{key} is {value!r}; it must be a whole number, 0 to {MOST}.")
    return value


def _vectors(wire: Mapping[str, Any], key: str, hidden_size: int) -> Tensor | None:
    value = wire.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{key} must be text (base64).")
    return from_text(value, hidden_size)
