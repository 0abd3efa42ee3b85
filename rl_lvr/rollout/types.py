"""What goes into an engine and what comes out: requests, sampling, rollouts, and the protocol of every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.density import Law
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import FREE, LatentStart


@dataclass(frozen=True)
class Sampling:
    """How tokens and latents are drawn. Names and meanings are TRL's and vLLM's."""

    max_tokens: int = 256
    """Tokens of a completion, START, SLOT and END included."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """Request i of a call draws with seed + i, unless the request brings its own."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's end-of-sequence tokens."""
    sigma: float = 0.0
    """Standard deviation of the exploration noise on every own latent, per dimension."""
    noise: Law = "gaussian"
    """The law of that noise (latents/density.py). Only engines with `SPHERICAL_NOISE` draw the spherical one."""
    latent_start: LatentStart = FREE
    """How START comes about in completions whose request does not say it."""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")

        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.temperature <= 100, "temperature", "between 0 (greedy) and 100")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "0 (all tokens) or more")
        need(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        need(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0 and finite")
        need(0 <= self.sigma < math.inf, "sigma", "0 or more and finite")

    @property
    def distorts(self) -> bool:
        """Whether tokens are drawn from another distribution than the whole softmax at this temperature, for a request
        without a `latent_start` of its own."""
        return distorts(self, self.latent_start)


def distorts(sampling: Any, start: LatentStart) -> bool:
    """`Sampling.distorts` of a request with this `start`. `sampling` may be vLLM's `SamplingParams`.

    Greedy: a cut never drops the likeliest token, a bias on START may.
    """
    cuts = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return bool(start.biased or sampling.repetition_penalty != 1.0 or (cuts and sampling.temperature > 0))


@dataclass(frozen=True)
class Request:
    """One prompt to complete."""

    prompt_ids: Sequence[int]
    """Token ids with image placeholders expanded, as the family's processor writes them."""
    images: dict[str, Tensor] = field(default_factory=dict)
    """The processor's image inputs of this row alone (pixel_values, image_grid_thw, ...)."""
    pictures: tuple[Image, ...] = ()
    """The images that `images` was made of, in their order: an engine in another process runs the processor itself."""
    prompt_latents: tuple[Tensor, Sequence[int]] | None = None
    """Vectors [n, H] and positions of latents that already stand in the prompt."""
    intervention: Intervention = Intervention.OWN
    vectors: Tensor | None = None
    """[n, H] for interventions that need vectors."""
    seed: int | None = None
    k: int | None = None
    """Latents per span (cap in `free` length) instead of the format's."""
    filler_id: int | None = None
    """The ordinary token of `PLAIN_TOKENS`."""
    latent_start: LatentStart | None = None
    """Instead of the call's (`Sampling.latent_start`)."""


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    """An end-of-sequence or stop token was sampled; it is the last token of the completion."""
    STOP = "stop"
    """A stop string appeared."""
    LENGTH = "length"
    """max_tokens or the model's last position was reached, possibly inside a span."""


@dataclass(frozen=True)
class Uncut:
    """The tokens of a completion under the whole softmax at the sampling temperature, markers banned: the distribution
    whose log-probs a trainer computes. Neither `repetition_penalty`, nor a cut (`top_k`, `top_p`, `min_p`), nor a bias
    on START is in it."""

    logprobs: Tensor
    """[C] float32; exactly 0 where forced."""
    log_kept_mass: Tensor
    """[C] float32, log of the probability of all tokens that the cut kept; exactly 0 where it dropped none, or where
    forced. Without a repetition penalty and a bias on START, `Uncut.logprobs` is `Rollout.logprobs` plus this."""

    def __getitem__(self, tokens: slice) -> Uncut:
        return Uncut(self.logprobs[tokens], self.log_kept_mass[tokens])


@dataclass(frozen=True)
class Rollout:
    """One completion. Positions of latents count from the first prompt token, padding excluded."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: Tensor
    """[C] float32, log-prob of each token under the distribution it was drawn from; exactly 0 where forced."""
    forced: Tensor
    """[C] bool, tokens that the engine wrote without a choice."""
    latents: Tensor
    """[n, H], the vectors that were fed, prompt latents included, in the model's precision. A completion that ends at a
    slot has that slot's vector too: it was chosen, only nothing came after it."""
    latent_positions: tuple[int, ...]
    stop_reason: StopReason
    seed: int
    sigma: float
    intervention: Intervention
    uncut: Uncut | None = None
    """None where neither the sampling settings nor `latent_start` change the distribution (`distorts`)."""
    latent_start: LatentStart = FREE

    @property
    def uncut_logprobs(self) -> Tensor:
        """[C] float32, what a trainer's log-probs are compared with."""
        return self.logprobs if self.uncut is None else self.uncut.logprobs

    @property
    def log_kept_mass(self) -> Tensor:
        """[C] float32, see `Uncut`."""
        return torch.zeros_like(self.logprobs) if self.uncut is None else self.uncut.log_kept_mass

    @property
    def ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


def latent_batch(rollouts: Sequence[Rollout]) -> LatentBatch:
    """The carrier of a group of rollouts, positions relative to each row's own `ids`."""
    return LatentBatch.from_rows(
        [r.latents for r in rollouts], [r.latent_positions for r in rollouts], [r.sigma for r in rollouts]
    )


class Capability(StrEnum):
    """What an engine can do; a missing one is an error with a cure, never a fallback."""

    FREE_LENGTH = "free_length"
    BEFORE_START = "before_start"
    INTERVENTIONS = "interventions"
    NOISE = "noise"
    SPHERICAL_NOISE = "spherical_noise"
    PROMPT_LATENTS = "prompt_latents"
    PROJECTOR = "projector"
    LATENT_START = "latent_start"
    """START can be forced, forbidden and biased."""
    WEIGHTS = "weights"
    """`sync_weights` works."""


class RolloutEngine(Protocol):
    """Anything that turns requests into rollouts."""

    markers: FormatIds
    capabilities: frozenset[Capability]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in their order."""
        ...

    def sync_weights(self, model: torch.nn.Module) -> None:
        """Take over a trainer's weights."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def request_seeds(requests: Sequence[Request], sampling: Sampling) -> list[int]:
    """The seed of each request: its own, or the call's plus its index."""
    return [sampling.seed + i if r.seed is None else r.seed for i, r in enumerate(requests)]


def start_of(request: Request, sampling: Sampling | None = None) -> LatentStart:
    """How START comes about in this request: as it says, or else as the call says."""
    if request.latent_start is not None:
        return request.latent_start
    return FREE if sampling is None else sampling.latent_start


def with_start(requests: Sequence[Request], sampling: Sampling) -> list[Request]:
    """The requests, each with the `latent_start` that holds for it."""
    return [replace(request, latent_start=start_of(request, sampling)) for request in requests]


def describe(rollout: Rollout) -> dict[str, Any]:
    """A rollout without its vectors, for logs and files."""
    return {
        "prompt_ids": list(rollout.prompt_ids),
        "completion_ids": list(rollout.completion_ids),
        "logprobs": rollout.logprobs.tolist(),
        "log_kept_mass": rollout.log_kept_mass.tolist(),
        "latent_positions": list(rollout.latent_positions),
        "stop_reason": rollout.stop_reason.value,
        "seed": rollout.seed,
        "sigma": rollout.sigma,
        "intervention": rollout.intervention.value,
        "latent_start": str(rollout.latent_start),
    }
