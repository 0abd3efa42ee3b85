"""Attention signals: how much one part of a sequence attends to another, and how narrowly.

m_i(R) is the softmax attention of query i on all keys of region R, the mean over the heads and layers chosen.
Regions and query sets are those of `regions.py`. The probe reads attention outside of autograd: no gradient here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rl_lvr.signals.declaring import Needs, signal
from rl_lvr.signals.forward import Forward
from rl_lvr.signals.probe import Reading
from rl_lvr.signals.regions import IMAGE_LABEL, REGIONS, Queries, Region
from rl_lvr.signals.values import Values

Chosen = tuple[int, ...] | None
Per = Literal["completion", "token"]
SMALLEST = 1e-6  # of a denominator; paper B's clamp
PAPER_B = Reading("mass", layers=(0,))


def _masses(parameters: Mapping[str, Any]) -> Needs:
    return Needs((Reading("mass", parameters["layers"], parameters["heads"]),), (parameters["queries"],))


def _entropies(parameters: Mapping[str, Any]) -> Needs:
    return Needs((Reading("image_entropy", parameters["layers"], parameters["heads"]),), ("latent", "after"))


def _mass(f: Forward, to: Region, queries: Queries, layers: Chosen, heads: Chosen) -> tuple[Tensor, Tensor]:
    """Query rows [N] and m_i(to) [N]."""
    rows, mass = f.attended(Reading("mass", layers, heads), queries)
    return rows, mass[:, list(REGIONS[to])].sum(-1)


@signal(_masses)
def attention_mass(
    f: Forward,
    *,
    to: Region = "latent",
    queries: Queries = "after",
    layers: Chosen = None,
    heads: Chosen = None,
    per: Per = "completion",
) -> Values:
    """Attention mass of the queries on `to`: mean over queries of m_i(to), or m_i(to) at each query's own token.

    Answer attention to latents and to the image over training is paper A's evidence figure (2605.02735); on all layers
    and heads it is ReaLVR's measure. 0 where there are no queries or no keys; the count is the number of queries.
    """
    rows, mass = _mass(f, to, queries, layers, heads)
    return f.per_sequence(mass, rows) if per == "completion" else f.per_token(mass, rows)


@signal(Needs((PAPER_B,), ("paper_b",)))
def attention_mass_paper_b(f: Forward, *, per: Per = "completion") -> Values:
    """Paper B's attention reward r_attn (2605.18641) as its code has it: decoder layer 0, plain mean over heads.

    Keys are the slots strictly between START and END, queries the text behind the last span; summed over keys, then
    mean over queries, or (`per="token"`) each query's mass at its own token. With nothing behind the last span the
    queries are the whole completion. Unlike the authors' padding-free mode the softmax is causal.
    """
    rows, mass = f.attended(PAPER_B, "paper_b")
    latent = mass[:, list(REGIONS["closed_slot"])].sum(-1)
    found = f.per_sequence(latent, rows) if per == "completion" else f.per_token(latent, rows)
    return _where_latents(f, found)


@signal(Needs((PAPER_B,), ("paper_b",)))
def attention_relative_paper_b(f: Forward) -> Values:
    """Paper B's relative reward (2605.18641) as its code has it: r_attn / max(r_image, 1e-6), and r_attn itself where
    the mass on the image is 0. `attention_relative` is 0 there.
    """
    rows, mass = f.attended(PAPER_B, "paper_b")
    mean, counts = f.mean(mass, rows)
    latent, image = mean[:, list(REGIONS["closed_slot"])].sum(-1), mean[:, IMAGE_LABEL]
    values = torch.where(image > 0, latent / image.clamp_min(SMALLEST), latent)
    return _where_latents(f, Values(values, counts))


def _where_latents(f: Forward, found: Values) -> Values:
    """The values, not counted where a sequence has none of paper B's keys."""
    keys = torch.isin(f.regions.labels, torch.tensor(REGIONS["closed_slot"], device=f.regions.labels.device))
    here = torch.bincount(f.regions.sequences[keys & (f.regions.sequences >= 0)], minlength=f.count)
    return replace(found, counts=torch.where(here.to(found.counts.device) > 0, found.counts, 0))


@signal(_masses)
def attention_relative(
    f: Forward,
    *,
    to: Region = "latent",
    queries: Queries = "after",
    layers: Chosen = None,
    heads: Chosen = None,
    per: Per = "completion",
) -> Values:
    """Mass on `to` divided by mass on the image: mean m(to) / max(mean m(image), 1e-6), or
    m_i(to) / max(m_i(image), 1e-6) at each query's own token.

    0 for a sequence without queries, without such keys or without an image: a ratio to nothing would only be large.
    Paper B's code has the mass itself without an image: `attention_relative_paper_b`.
    """
    rows, mass = f.attended(Reading("mass", layers, heads), queries)
    return _divided(f, rows, mass, to, per, lambda mass: mass[:, IMAGE_LABEL])


@signal(_masses)
def attention_without_sink(
    f: Forward,
    *,
    to: Region = "latent",
    queries: Queries = "after",
    layers: Chosen = None,
    heads: Chosen = None,
    per: Per = "completion",
) -> Values:
    """Share of `to` in the attention that does not go to the sink: mean m(to) / max(1 - mean m(sink), 1e-6), or the
    same of each query at its own token.

    The sink is the sequence's first token, which many heads attend to when they have nothing to look at
    (StreamingLLM, 2309.17453).
    """
    rows, mass = f.attended(Reading("mass", layers, heads), queries)
    sink = list(REGIONS["sink"])
    return _divided(f, rows, mass, to, per, lambda mass: (1 - mass[:, sink].sum(-1)).clamp_min(SMALLEST))


def _divided(f: Forward, rows: Tensor, mass: Tensor, to: Region, per: Per, below: Callable[[Tensor], Tensor]) -> Values:
    """m(to) / max(below(m), 1e-6) of the mean over queries, or of each query; 0 and not counted where below(m) is 0.

    `mass` [N, LABELS] at the query rows [N]; `below` maps such masses to [N].
    """

    def ratio(mass: Tensor) -> tuple[Tensor, Tensor]:
        under = below(mass)
        share = mass[:, list(REGIONS[to])].sum(-1) / under.clamp_min(SMALLEST)
        return torch.where(under > 0, share, 0.0), under > 0

    if per == "token":
        values, there = ratio(mass)
        return f.per_token(values[there], rows[there.to(rows.device)])
    mean, counts = f.mean(mass, rows)
    values, there = ratio(mean)
    return Values(values, torch.where(there, counts, 0))


@signal(_entropies)
def image_attention_entropy_difference(f: Forward, *, layers: Chosen = None, heads: Chosen = None) -> Values:
    """How much more narrowly latents look at the image than the answer does (paper D, 2606.01287; our reconstruction).

    Entropy in nats of the attention over the image tokens, renormalised to 1, mean over latent rows minus mean over
    the text after the last span; negative is narrower at latents. 0 with count 0 unless the sequence has an image,
    a latent and text after it; the count is the number of latents.
    """
    reading = Reading("image_entropy", layers, heads)
    latents, latent_counts = f.mean(*reversed(f.attended(reading, "latent")))
    answers, answer_counts = f.mean(*reversed(f.attended(reading, "after")))
    images = torch.bincount(f.regions.sequences[f.regions.image], minlength=f.count).to(latents.device)
    there = (latent_counts > 0) & (answer_counts > 0) & (images > 0)
    return Values(torch.where(there, latents - answers, 0.0), torch.where(there, latent_counts, 0))
