"""Definitions of signals as functions of a pass that is written by hand: their values, and exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, LatentFormat
from rl_lvr.ops.vocab_stats import VocabStats, vocab_stats
from rl_lvr.signals import SIGNALS, Forward, Needs, Reading, Values, find_regions, parse_signals
from rl_lvr.signals.confidence import first_latents
from rl_lvr.signals.regions import LABELS

WORD, IMAGE, START, SLOT, END = range(1, 6)
MARKERS = FormatIds(LatentFormat("t", "<s>", "<a>", "<e>", k=3), START, SLOT, END)
ROWS = (
    [WORD, IMAGE, IMAGE, IMAGE, WORD, START, SLOT, SLOT, SLOT, END, WORD, START, SLOT, SLOT, END, WORD],
    [WORD, IMAGE, WORD, START, SLOT, END, WORD],
    [WORD, WORD],
)
WIDTH, HIDDEN, VOCABULARY = max(map(len, ROWS)), 5, 12
VECTORS = ("latent_norm", "latent_image_cosine", "latent_span_cosine")
PREDICTIONS = ("latent_entropy", "latent_confidence", "entropy_drop", "confidence_progression", "end_at_first_slot")
MORE = (
    {"latent_image_cosine": {"reduce": "mean", "space": "hidden", "name": "mean_cosine"}},
    {"latent_entropy": {"per": "latent", "name": "each_entropy"}},
    {"confidence_reward": {"k": 4, "weight": 0.5}},
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pass_of(vectors: Tensor) -> Forward:
    """A pass whose inputs and hidden states are both `vectors` [B, T, H], and whose masses are made up."""
    ids = torch.tensor([row + [0] * (WIDTH - len(row)) for row in ROWS])
    regions = find_regions(ids, ids > 0, (ids > 0) & (torch.arange(WIDTH) >= 5), MARKERS, IMAGE)
    spans = regions.spans
    rows = (spans.latent | first_latents(spans.latent, spans.index, before=True)).flatten().nonzero()[:, 0]

    def vocabulary(top_k: int) -> VocabStats:
        states = vectors.flatten(0, 1)[rows]
        chosen = torch.full((len(rows),), END)
        head = drawn(VOCABULARY, HIDDEN, seed=9).to(vectors.dtype)
        return vocab_stats(states, head, chosen=chosen, top_k=top_k, backend="torch")

    mass = drawn(regions.labels.numel(), LABELS, seed=8).softmax(-1)
    return Forward(
        regions=regions,
        attention_rows=torch.arange(regions.labels.numel()),
        attention={Reading("mass"): mass, Reading("mass", (0,)): mass, Reading("image_entropy"): mass[:, 0]},
        vocabulary_rows=rows,
        vocabulary=vocabulary,
        vectors=lambda space, mask: vectors[mask],
        queries=("after", "latent", "paper_b"),
    )


def function_of(entry: Any) -> Callable[[Tensor], Values]:
    (spec,) = parse_signals([entry])
    return lambda vectors: spec.function(pass_of(vectors).limited(spec.needs, spec.name), **spec.parameters)


@pytest.mark.parametrize("entry", [*VECTORS, *PREDICTIONS, *MORE], ids=str)
def test_gradients_are_exact(entry: Any) -> None:
    vectors = drawn(len(ROWS), WIDTH, HIDDEN).requires_grad_()
    function = function_of(entry)
    assert torch.autograd.gradcheck(lambda v: function(v).values, (vectors,))
    (gradient,) = torch.autograd.grad(function(vectors).values.sum(), vectors)
    assert float(gradient[:2].abs().max()) > 1e-3
    assert float(gradient[2].abs().max()) == 0  # a rollout without latents


@pytest.mark.parametrize("entry", [*VECTORS, *MORE], ids=str)
def test_gradients_in_single_precision(entry: Any) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        vectors = drawn(len(ROWS), WIDTH, HIDDEN).to(dtype).requires_grad_()
        found += torch.autograd.grad(function_of(entry)(vectors).values.sum(), vectors)
    assert found[1].dtype == torch.float32
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_a_value_that_is_cut_off_from_its_pass_has_no_gradient() -> None:
    """The control: one `.tolist()` on the way and gradcheck refuses the function."""
    vectors = drawn(len(ROWS), WIDTH, HIDDEN).requires_grad_()
    function = function_of("latent_norm")

    def cut(v: Tensor) -> Tensor:
        return torch.tensor(function(v).values.tolist(), dtype=v.dtype) + 0 * v.sum()

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(cut, (vectors,))


def test_values_are_those_of_each_rollout() -> None:
    vectors = drawn(len(ROWS), WIDTH, HIDDEN)
    found = function_of("latent_norm")(vectors).column()
    places = [[6, 7, 8, 12, 13], [4], []]
    truth = [vectors[row, at].norm(dim=-1).mean().item() if at else 0.0 for row, at in enumerate(places)]
    assert found.values == pytest.approx(truth, abs=1e-12)
    assert found.counts == [5, 1, 0]
    each = function_of(MORE[1])(vectors)
    assert each.lengths is not None
    assert each.lengths.tolist() == [5, 1, 0]
    assert [len(part) for part in each.column().values] == [5, 1, 0]  # type: ignore[arg-type]


def test_every_definition_returns_tensors_and_reads_what_it_declares() -> None:
    for name in SIGNALS:
        found = function_of(name)(drawn(len(ROWS), WIDTH, HIDDEN))
        assert found.values.shape == found.counts.shape == (len(ROWS),)
        assert found.values.is_floating_point()
        assert not found.counts.is_floating_point()
        (spec,) = parse_signals([name])
        if spec.needs != Needs():
            with pytest.raises(UserError, match="without declaring"):  # the control
                spec.function(pass_of(drawn(len(ROWS), WIDTH, HIDDEN)).limited(Needs(), name))
