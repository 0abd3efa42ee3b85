"""Teacher forcing: recorded tokens and latents in one parallel forward, held against what an engine returned.

A trainer does the same with every rollout, so a difference here is a difference in its losses. No gradients in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.models import family_of
from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.forward import evaluating, forward_hidden, replay_batch
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling


@dataclass(frozen=True)
class Replay:
    """What the model says about recorded rollouts."""

    logprobs: Tensor
    """[B, C] float32, each completion token under the distribution it was drawn from; 0 where forced and on padding."""
    latents: list[Tensor]
    """[n_i, H] per row: f(h) of the position before each recorded latent, without exploration noise."""


def teacher_force(
    model: nn.Module,
    rollouts: Sequence[Rollout],
    images: Sequence[Mapping[str, Any]],
    markers: FormatIds,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    feed: bool = True,
) -> Replay:
    """Replay `rollouts`, whose images are `images` (one dict per row, {} for none), drawn with `sampling`.

    `feed=False` leaves SLOT's own embeddings where the latents belong: the negative control of every comparison.
    """
    logprobs: list[Tensor] = []
    latents: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rollouts), batch_size):
            rows = rollouts[start : start + batch_size]
            batch = replay_batch(model, rows, images[start : start + batch_size])
            hidden = forward_hidden(model, batch, markers, feed=feed)
            for row, rollout in enumerate(rows):
                logprobs.append(_logprobs(model, hidden[row], rollout, markers, sampling))
                before = torch.tensor(rollout.latent_positions, dtype=torch.long, device=hidden.device) - 1
                latents.append(feedback(model, hidden[row, before]).cpu())
    return Replay(torch.nn.utils.rnn.pad_sequence(logprobs, batch_first=True), latents)


def _logprobs(model: nn.Module, hidden: Tensor, rollout: Rollout, markers: FormatIds, sampling: Sampling) -> Tensor:
    """[C] on the CPU. `hidden` [T, H] is this row's; the head sees only positions where something was chosen."""
    prompt = len(rollout.prompt_ids)
    tokens = torch.tensor(rollout.completion_ids)
    result = torch.zeros(len(tokens))
    chosen = (~rollout.forced).nonzero()[:, 0]
    if not len(chosen):
        return result
    raw = family_of(model).head(model)(hidden[prompt - 1 + chosen.to(hidden.device)]).float()
    ids = tokens[chosen].to(raw.device)
    logits = draws.ban(raw, torch.tensor(markers.never_sampled, device=raw.device))
    if markers.start is not None and (rollout.intervention is Intervention.NONE or markers.format.feedback == "none"):
        logits = draws.ban(logits, torch.tensor([markers.start], device=raw.device))
    if sampling.repetition_penalty != 1.0:
        seen = _seen_before(rollout, prompt + chosen, raw.shape[1]).to(raw.device)
        logits = draws.penalise(logits, seen, sampling.repetition_penalty)
    values = draws.warp(logits, sampling).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    if markers.end is not None:
        decisions = (ids == markers.end) | (ids == markers.slot)
        pair = draws.warp(draws.end_or_not(raw, markers.end), sampling).log_softmax(-1)
        values = torch.where(decisions, pair.gather(1, (ids != markers.end).long()[:, None])[:, 0], values)
    result[chosen] = values.cpu()
    return result


def _seen_before(rollout: Rollout, positions: Tensor, vocabulary: int) -> Tensor:
    """[M, V], whether a token stands before each position of the row."""
    ids = torch.tensor(rollout.ids)
    first = torch.full((vocabulary,), len(ids)).scatter_reduce_(0, ids, torch.arange(len(ids)), "amin")
    return first[None, :] < positions[:, None]


@dataclass(frozen=True)
class ParityReport:
    """The largest differences between an engine's rollouts and their replay."""

    max_dh: float
    """Between a latent of the model's own and f(h) of the position before it, noise taken off."""
    max_dlogp: float
    control_dh: float
    """The same two with SLOT's embedding in place of every latent. They must be large, or the check sees nothing."""
    control_dlogp: float
    latents: int
    """Own latents compared."""
    tokens: int
    """Chosen tokens compared."""

    def passes(self, tolerance: float = 1e-4, control: float = 1e-2) -> bool:
        """Whether the replay agrees and the control does not. Without a latent there is nothing to pass."""
        agrees = max(self.max_dh, self.max_dlogp) <= tolerance
        return self.latents > 0 and agrees and max(self.control_dh, self.control_dlogp) > control


def check_parity(
    engine: RolloutEngine,
    model: nn.Module,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    rollouts: Sequence[Rollout] | None = None,
) -> ParityReport:
    """Hold what `engine` generates (or has generated: `rollouts`) against `model`, the Hugging Face model it runs."""
    rollouts = engine.generate(requests, sampling) if rollouts is None else rollouts
    if not rollouts:
        raise UserError("a parity check needs at least one request.")
    images = [request.images for request in requests]
    fed, control = (
        teacher_force(model, rollouts, images, engine.markers, sampling, feed=feed) for feed in (True, False)
    )
    pairs = list(zip(rollouts, fed.latents, control.latents, strict=True))
    return ParityReport(
        max_dh=max(_latent_difference(rollout, replayed) for rollout, replayed, _ in pairs),
        max_dlogp=_logprob_difference(rollouts, fed.logprobs),
        control_dh=max(_latent_difference(rollout, replayed) for rollout, _, replayed in pairs),
        control_dlogp=_logprob_difference(rollouts, control.logprobs),
        latents=sum(int(_own(rollout).sum()) for rollout in rollouts),
        tokens=sum(int((~rollout.forced).sum()) for rollout in rollouts),
    )


def _own(rollout: Rollout) -> Tensor:
    """[n] bool: latents that are the model's own, those of the prompt left out."""
    if rollout.intervention is not Intervention.OWN:
        return torch.zeros(len(rollout.latent_positions), dtype=torch.bool)
    return torch.tensor(rollout.latent_positions, dtype=torch.long) >= len(rollout.prompt_ids)


def _latent_difference(rollout: Rollout, replayed: Tensor) -> float:
    own = _own(rollout)
    if not bool(own.any()):
        return 0.0
    positions = torch.tensor(rollout.latent_positions, dtype=torch.long)
    noise = keyed_normal(torch.full_like(positions, rollout.seed), positions, replayed.shape[1])
    difference = rollout.latents.float() - (replayed.float() + rollout.sigma * noise)
    return float(difference[own].abs().max())


def _logprob_difference(rollouts: Sequence[Rollout], replayed: Tensor) -> float:
    recorded = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in rollouts], batch_first=True)
    return float((recorded - replayed).abs().max())
