"""Latent objectives: what a predicted latent is compared with, and how.

Pairing (papers C and LVR): the state at position p - 1, through the feedback map, predicts the vector at position p.
Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lvr.errors import UserError

INFONCE_TEMPERATURE = 0.07
"""LanteRn's; src/trainer/sft_trainer.py there."""
CONTRAST_TEMPERATURE = 0.2
"""Paper A's released scripts (main.py defaults to 0.07)."""


@dataclass(frozen=True)
class LatentPairs:
    """All latents of a batch that have a target, one row each."""

    predicted: Tensor
    """[N, H], f(hidden state of position p - 1), with gradient."""
    target: Tensor
    """[N, H], the vector that belongs at position p."""
    states: Tensor | None = None
    """[N, H], hidden state at position p itself; only for `contrast`."""
    image: Tensor | None = None
    """[M, H], hidden states at all image positions of the batch; only for `contrast`."""
    positive: Tensor | None = None
    """[N, M] bool, image positions that are relevant to a latent."""
    negative: Tensor | None = None
    """[N, M] bool, image positions of the same row that are not."""


def nmse(pairs: LatentPairs) -> Tensor:
    """Squared error over the targets' variance in the batch: 1 is as good as their mean, 0 is exact."""
    predicted, target = pairs.predicted.float(), pairs.target.float()
    return F.mse_loss(predicted, target) / target.var().clamp_min(1e-8)


def cosine(pairs: LatentPairs) -> Tensor:
    """1 - cosine (Monet, Mirage, ILVR)."""
    return (1 - F.cosine_similarity(pairs.predicted.float(), pairs.target.float(), dim=-1)).mean()


def infonce(pairs: LatentPairs) -> Tensor:
    """Bidirectional InfoNCE against the other latents of the batch on this process.

    LanteRn flattens a block to K x D and contrasts blocks; here every latent is contrasted on its own, so spans of
    different lengths mix. A target that equals another row's (the same region twice) is no negative of it.
    """
    predicted = F.normalize(pairs.predicted.float(), dim=-1)
    target = F.normalize(pairs.target.float(), dim=-1)
    logits = predicted @ target.T / INFONCE_TEMPERATURE
    same = (target @ target.T) > 1 - 1e-5
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrast(pairs: LatentPairs) -> Tensor:
    """Query-guided contrast of paper A, Stage I: the state at a latent against image states of its row.

    loss_i = -log( sum_p e^{s_p} / (sum_p e^{s_p} + sum_n e^{s_n}) ), s = cosine / tau, mean over i. The released code
    optimises input embeddings under a frozen backbone and picks positives by attention; here the parameters are
    trained and positives are the image tokens of the annotated region. Latents without a positive are left out.
    """
    if pairs.states is None or pairs.image is None or pairs.positive is None or pairs.negative is None:
        raise ValueError("contrast needs the states of latents and image tokens, and which are relevant.")
    usable = pairs.positive.any(1) & pairs.negative.any(1)
    if not bool(usable.any()):
        return pairs.states.sum() * 0.0
    states = F.normalize(pairs.states[usable].float(), dim=-1)
    scores = states @ F.normalize(pairs.image.float(), dim=-1).T / CONTRAST_TEMPERATURE
    chosen = scores.masked_fill(~pairs.positive[usable], float("-inf")).logsumexp(1)
    both = scores.masked_fill(~(pairs.positive | pairs.negative)[usable], float("-inf")).logsumexp(1)
    return (both - chosen).mean()


OBJECTIVES: dict[str, Callable[[LatentPairs], Tensor]] = {
    "nmse": nmse,
    "cosine": cosine,
    "infonce": infonce,
    "contrast": contrast,
}


TOWARDS_TARGETS = ("nmse", "cosine", "infonce")
"""Objectives that pull predictions towards the target vectors, which the vision tower and the merger make."""


def parse_objective(text: str) -> dict[str, float]:
    """``"nmse"`` or ``"nmse:1,infonce:0.1"`` -> weights by name."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in OBJECTIVES:
            raise UserError(
                f"no latent objective {name!r}; choose from {', '.join(OBJECTIVES)}, such as nmse:1,cosine:0.5."
            )
        try:
            weights[name] = float(weight) if weight else 1.0
        except ValueError as error:
            raise UserError(f"latent objective {name!r} has the weight {weight!r}, which is no number.") from error
        if not weights[name] >= 0:
            raise UserError(f"latent objective {name!r} has the weight {weight}; it must be 0 or more.")
    return weights


def moving_targets(config: Any, parts: Mapping[str, list[nn.Parameter]]) -> str | None:
    """Why the latent objective has targets that change while they are learned; None if they do not.

    Args:
        config: Of the run: its objective, the weight of it.
        parts: The parameters that make the targets, as `Family.vision_parameters` returns them.
    """
    pulled = [name for name in TOWARDS_TARGETS if config.objective.get(name)]
    trained = [name for name, weights in parts.items() if any(weight.requires_grad for weight in weights)]
    if not (pulled and trained and (config.latent_weight or config.latent_weight_end)):
        return None
    switches = {"tower": "freeze_vision_tower", "merger": "freeze_merger"}
    names, pull = " and ".join(pulled), "pulls" if len(pulled) == 1 else "pull"
    return (
        f"{names} {pull} latents towards vectors of the vision {' and '.join(trained)}, which this run trains: the "
        "targets move away from what was learned, and the loss may start in the hundreds. Freeze "
        f"{' and '.join(trained)} ({', '.join(switches[name] for name in trained)} in a recipe, freeze_vision in "
        "Python), or use latent_objective contrast."
    )


def latent_objective(pairs: LatentPairs, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum and the detached parts by name. Without latents in the batch it is a zero with a gradient path."""
    if not len(pairs.predicted):
        return pairs.predicted.sum() * 0.0, {}
    parts = {name: OBJECTIVES[name](pairs) for name in weights}
    total = sum(weights[name] * part for name, part in parts.items())
    return torch.as_tensor(total), {name: part.detach() for name, part in parts.items()}
