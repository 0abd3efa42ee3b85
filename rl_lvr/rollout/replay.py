"""Teacher forcing: recorded tokens and latents in one parallel forward, held against what an engine returned.

A trainer does the same with every rollout, so a difference here is a difference in its losses. No gradients in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import ReplayBatch, batch_images, evaluating, forward_hidden
from rl_lvr.latents.density import Law, explore
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.models import family_of
from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling, Uncut, latent_batch
from rl_lvr.wrapping import input_embeddings


def replay_batch(
    model: nn.Module, rollouts: Sequence[Rollout], images: Sequence[Mapping[str, Any]], *, side: str = "right"
) -> ReplayBatch:
    """Pad `rollouts`, whose images are `images` (one dict per row, {} for none), on `side`."""
    weight: Any = input_embeddings(model).weight
    rows = [torch.tensor(rollout.ids) for rollout in rollouts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side).to(weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)[:, None]
    prompts = torch.tensor([len(rollout.prompt_ids) for rollout in rollouts], device=ids.device)[:, None]
    shift = ids.shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
    place = torch.arange(ids.shape[1], device=ids.device) - shift
    mask = (place >= 0) & (place < lengths)
    return ReplayBatch(
        ids=ids,
        mask=mask.long(),
        completion=mask & (place >= prompts),
        latents=latent_batch(rollouts).shifted(shift[:, 0].cpu()),
        images=batch_images(family_of(model), model, images),
    )


@dataclass(frozen=True)
class Replay:
    """What the model says about recorded rollouts."""

    logprobs: Tensor
    """[B, C] float32, each completion token under the distribution it was drawn from; 0 where forced and on padding."""
    uncut: list[Uncut]
    """Per row, [C_i]: the same tokens before repetition penalty and cut."""
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
    scores: list[Tensor] = []
    latents: list[Tensor] = []
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rollouts), batch_size):
            rows = rollouts[start : start + batch_size]
            batch = replay_batch(model, rows, images[start : start + batch_size])
            hidden = forward_hidden(model, batch, markers, feed=feed)
            for row, rollout in enumerate(rows):
                scores.append(_scores(model, hidden[row], rollout, markers, sampling))
                before = torch.tensor(rollout.latent_positions, dtype=torch.long, device=hidden.device) - 1
                latents.append(feedback(model, hidden[row, before]).cpu())
    drawn = torch.nn.utils.rnn.pad_sequence([row[0] for row in scores], batch_first=True)
    return Replay(drawn, [Uncut(row[1], row[2]) for row in scores], latents)


def _scores(model: nn.Module, hidden: Tensor, rollout: Rollout, markers: FormatIds, sampling: Sampling) -> Tensor:
    """[3, C] on the CPU: log-probs, log-probs before penalty and cut, and the log of the kept mass.

    `hidden` [T, H] is this row's; the head sees only positions where something was chosen.
    """
    prompt = len(rollout.prompt_ids)
    tokens = torch.tensor(rollout.completion_ids)
    result = torch.zeros(3, len(tokens))
    chosen = (~rollout.forced).nonzero()[:, 0]
    if not len(chosen):
        return result
    raw = family_of(model).head(model)(hidden[prompt - 1 + chosen.to(hidden.device)]).float()
    ids = tokens[chosen].to(raw.device)
    logits = draws.ban(raw, torch.tensor(markers.never_sampled, device=raw.device))
    never = rollout.intervention is Intervention.NONE or rollout.latent_start.forbidden
    if markers.start is not None and (never or markers.format.feedback == "none"):
        logits = draws.ban(logits, torch.tensor([markers.start], device=raw.device))
    whole = draws.heat(logits, sampling.temperature)
    if rollout.latent_start.biased:
        assert markers.start is not None
        bias = torch.full((len(logits),), rollout.latent_start.bias, device=raw.device)
        logits = draws.bias_in_rows(logits, markers.start, bias)
    if sampling.repetition_penalty != 1.0:
        seen = _seen_before(rollout, prompt + chosen, raw.shape[1]).to(raw.device)
        logits = draws.penalise(logits, seen, sampling.repetition_penalty)
    values = _score(whole, draws.warp(logits, sampling), ids)
    if markers.end is not None:
        decisions = (ids == markers.end) | (ids == markers.slot)
        pair = draws.end_or_not(raw, markers.end)
        warped = draws.warp(pair, sampling)
        decided = _score(draws.heat(pair, sampling.temperature), warped, (ids != markers.end).long())
        values = torch.where(decisions, decided, values)
    result[:, chosen] = values.cpu()
    return result


def _score(whole: Tensor, warped: Tensor, index: Tensor) -> Tensor:
    """[3, M] of the `index` [M] that was chosen from logits `warped`, which are `whole` before penalty and cut."""
    drawn = warped.log_softmax(-1).gather(1, index[:, None])[:, 0]
    return torch.stack((drawn, *draws.uncut(whole, warped, index)))


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
    """Of the log-probs under the distribution that was drawn from."""
    max_duncut: float
    """Of the log-probs before repetition penalty and cut: those that a trainer uses."""
    max_dkept: float
    """Of the log of the kept mass."""
    control_dh: float
    """The first two with SLOT's embedding in place of every latent. They must be large, or the check sees nothing."""
    control_dlogp: float
    latents: int
    """Own latents compared."""
    tokens: int
    """Chosen tokens compared."""

    def passes(self, tolerance: float = 1e-4, control: float = 1e-2) -> bool:
        """Whether the replay agrees and the control does not. Without a latent there is nothing to pass."""
        agrees = max(self.max_dh, self.max_dlogp, self.max_duncut, self.max_dkept) <= tolerance
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
        max_dh=max(_latent_difference(rollout, replayed, sampling.noise) for rollout, replayed, _ in pairs),
        max_dlogp=_logprob_difference(rollouts, fed.logprobs),
        max_duncut=_largest(r.uncut_logprobs - u.logprobs for r, u in zip(rollouts, fed.uncut, strict=True)),
        max_dkept=_largest(r.log_kept_mass - u.log_kept_mass for r, u in zip(rollouts, fed.uncut, strict=True)),
        control_dh=max(_latent_difference(rollout, replayed, sampling.noise) for rollout, _, replayed in pairs),
        control_dlogp=_logprob_difference(rollouts, control.logprobs),
        latents=sum(int(_own(rollout).sum()) for rollout in rollouts),
        tokens=sum(int((~rollout.forced).sum()) for rollout in rollouts),
    )


def _own(rollout: Rollout) -> Tensor:
    """[n] bool: latents that are the model's own, those of the prompt left out."""
    if rollout.intervention is not Intervention.OWN:
        return torch.zeros(len(rollout.latent_positions), dtype=torch.bool)
    return torch.tensor(rollout.latent_positions, dtype=torch.long) >= len(rollout.prompt_ids)


def _latent_difference(rollout: Rollout, replayed: Tensor, law: Law) -> float:
    own = _own(rollout)
    if not bool(own.any()):
        return 0.0
    positions = torch.tensor(rollout.latent_positions, dtype=torch.long)
    seeds, sigma = torch.full_like(positions, rollout.seed), torch.full((len(positions),), rollout.sigma)
    difference = rollout.latents.float() - drawn_again(replayed.float(), seeds, positions, sigma, law)
    return float(difference[own].abs().max())


def drawn_again(means: Tensor, seeds: Tensor, positions: Tensor, sigma: Tensor, law: Law) -> Tensor:
    """Latents [N, H] as an engine drew them around `means`: noise is keyed by seed [N] and position in the row [N]."""
    drawn = explore(means, keyed_normal(seeds, positions, means.shape[1]), sigma, law)
    return torch.where((sigma > 0)[:, None], drawn, means.to(drawn.dtype))


def _logprob_difference(rollouts: Sequence[Rollout], replayed: Tensor) -> float:
    recorded = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in rollouts], batch_first=True)
    return float((recorded - replayed).abs().max())


def _largest(differences: Iterable[Tensor]) -> float:
    return float(torch.cat([torch.zeros(1), *differences]).abs().max())
