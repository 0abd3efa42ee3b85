"""Conditions made of interventions: whose vectors go where. The only place that chooses donors and means.

Evaluation and diagnostics ask for a condition by name; the engine below is only told which vectors to feed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.types import Request, Rollout, RolloutEngine, Sampling, request_seeds


def run_condition(
    engine: RolloutEngine,
    requests: Sequence[Request],
    sampling: Sampling,
    condition: Intervention,
    *,
    oracles: Sequence[Tensor] | None = None,
    answers: Sequence[Hashable] | None = None,
    own: Sequence[Rollout] | None = None,
    filler_id: int | None = None,
) -> list[Rollout]:
    """Run all requests under one condition; whatever their own intervention was is replaced.

    `oracles`: [n_i, H] per request, for `ORACLE`. `answers`: one per request, so that a `SWAP` donor has another one;
    without them every request counts as different. `own`: rollouts of these requests under `OWN`, so that they are not
    run again for `SWAP` and `MEAN`. `filler_id`: the ordinary token of `PLAIN_TOKENS`. For `GIVEN` the requests bring
    their vectors. Seeds do not depend on the condition: up to the first latent all conditions draw the same tokens
    where the model is given the same things.
    """
    for name, given in (("oracles", oracles), ("answers", answers), ("own", own)):
        if given is not None and len(given) != len(requests):
            raise UserError(f"{len(given)} {name} for {len(requests)} requests: give one per request.")
    seeds = request_seeds(requests, sampling)
    plain = [
        replace(r, seed=s, intervention=Intervention.OWN, vectors=None) for r, s in zip(requests, seeds, strict=True)
    ]

    vectors: Sequence[Tensor | None] = [None] * len(requests)
    if condition is Intervention.GIVEN:
        vectors = [request.vectors for request in requests]
    elif condition is Intervention.ORACLE:
        if oracles is None:
            raise UserError("condition 'oracle' needs oracle vectors: give the evidence of every request.")
        vectors = oracles
    elif condition in (Intervention.SWAP, Intervention.MEAN) and requests:
        own = engine.generate(plain, sampling) if own is None else own
        latents = [own_latents(r, rollout) for r, rollout in zip(requests, own, strict=True)]
        vectors = (
            swapped(latents, answers, sampling.seed)
            if condition is Intervention.SWAP
            else [mean_latents(latents)] * len(requests)
        )
    return engine.generate(
        [
            replace(
                request,
                intervention=condition,
                vectors=given,
                filler_id=filler_id if request.filler_id is None else request.filler_id,
            )
            for request, given in zip(plain, vectors, strict=True)
        ],
        sampling,
    )


def own_latents(request: Request, rollout: Rollout) -> Tensor:
    """[n, H]: the latents that the engine made itself, those that came with the prompt left out."""
    given = 0 if request.prompt_latents is None else len(request.prompt_latents[1])
    return rollout.latents[given:]


def swapped(latents: Sequence[Tensor], answers: Sequence[Hashable] | None, seed: int) -> list[Tensor]:
    """For every row the latents of another row with another answer.

    Rows with latents exchange theirs in a permutation without fixed points; a row that made none gets those of any
    suitable row, should it open a span after all.
    """
    answers = list(range(len(latents))) if answers is None else list(answers)
    makers = [row for row, vectors in enumerate(latents) if len(vectors)]
    donors = dict(zip(makers, derangement([answers[row] for row in makers], seed), strict=True))
    result = []
    for row, answer in enumerate(answers):
        if row in donors:
            result.append(latents[makers[donors[row]]])
            continue
        others = [maker for maker in makers if answers[maker] != answer]
        if not others:
            raise UserError(f"swap: no request with an answer other than {answer!r} made latents.")
        result.append(latents[random.Random(f"{seed} {row}").choice(others)])
    return result


def derangement(answers: Sequence[Hashable], seed: int) -> list[int]:
    """For every place the place of its donor, each donor once, none with the same answer. The same for the same seed.

    Rows are laid out answer by answer and shifted by the size of the largest group: a group then always meets
    another one, which is possible exactly if no answer makes up more than half of the rows.
    """
    if not answers:
        raise UserError("swap: no request made any latents, so there is nothing to exchange.")
    counts = Counter(answers)
    answer, most = counts.most_common(1)[0]
    if 2 * most > len(answers):
        raise UserError(
            f"swap: {most} of {len(answers)} requests with latents have the answer {answer!r}, more than half, so not "
            "every donor can have another answer: give a more balanced set of requests."
        )
    shuffle = random.Random(seed).shuffle
    groups = list(counts)
    shuffle(groups)
    order = []
    for group in groups:
        members = [place for place, value in enumerate(answers) if value == group]
        shuffle(members)
        order += members
    donors = [0] * len(answers)
    for i, place in enumerate(order):
        donors[place] = order[(i + most) % len(order)]
    return donors


def mean_latents(latents: Sequence[Tensor]) -> Tensor:
    """[n, H]: vector i is the mean over all rows that have a latent number i."""
    longest = max(len(vectors) for vectors in latents)
    if not longest:
        raise UserError("mean: no request made any latents, so there is nothing to average.")
    return torch.stack(
        [torch.stack([vectors[i].float() for vectors in latents if len(vectors) > i]).mean(0) for i in range(longest)]
    ).to(latents[0].dtype)
