"""The map of a region against the definition of attention in float64, for any number of tokens, chunk and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lvr.ops.attention_mass import log_sum_exp, reference
from rl_lvr.ops.attention_mass.problem import Problem
from rl_lvr.signals import Reading, region_scores
from rl_lvr.signals.region_map import region_map

TOKENS, HEADS = 150, (3, 0)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 90},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 4.0])},
    "all": {"window": 90, "softcap": 1.5, "sinks": torch.tensor([0.5, -1.0, 2.0, 4.0])},
}


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, segments [2, T] (two packed sequences, then padding), the region's columns, rows."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, TOKENS, 8, generator=draw)
    key = torch.randn(2, 2, TOKENS, 8, generator=draw)
    segments = torch.zeros(2, TOKENS, dtype=torch.long)
    segments[:, 120:] = 1
    segments[1, 140:] = -1
    region = torch.rand(2, TOKENS, generator=draw) < 0.8
    region &= segments >= 0
    columns = torch.full((2, TOKENS), -1)
    for b in range(2):
        for part in (0, 1):
            mine = region[b] & (segments[b] == part)
            columns[b, mine] = torch.arange(int(mine.sum()))
    rows = (torch.rand(2 * TOKENS, generator=draw) < 0.3).nonzero()[:, 0]
    return query, key, segments, columns, rows


def expected(case: dict[str, Any], query: Tensor, key: Tensor, segments: Tensor, columns: Tensor, rows: Tensor) -> Any:
    """[N, H, width] float64, from the whole matrix."""
    problem = Problem(query, key, 0.7, rows, segments, case.get("window"), case.get("softcap"), HEADS)
    p = reference.select(problem, reference.probabilities(problem, case.get("sinks")))
    found = torch.zeros(len(rows), len(HEADS), int(columns.max()) + 1, dtype=torch.float64)
    for i, row in enumerate(rows.tolist()):
        b, t = divmod(row, TOKENS)
        keys = ((columns[b] >= 0) & (segments[b] == segments[b, t])).nonzero()[:, 0]
        if segments[b, t] >= 0:
            found[i][:, columns[b, keys]] = p[i][:, keys]
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_map_is_its_definition(name: str) -> None:
    case = CASES[name]
    query, key, segments, columns, rows = drawn(0)
    view = {"scale": 0.7, "window": case.get("window"), "softcap": case.get("softcap"), "heads": HEADS}
    lse = log_sum_exp(query, key, rows=rows, segments=segments, sinks=case.get("sinks"), backend="torch", **view)
    width = int(columns.max()) + 1
    assert width > 64
    truth = expected(case, query, key, segments, columns, rows)
    given_ = (query, key, columns, width, rows, lse)
    by_head = region_map(*given_, segments=segments, by_head=True, **view)
    assert (by_head - truth).abs().max() < 1e-5
    assert (region_map(*given_, segments=segments, **view) - truth.mean(1)).abs().max() < 1e-5
    # Controls: another order of heads, tokens that look into their neighbour, and a sum that is not 1.
    assert (by_head.flip(1) - truth).abs().max() > 1e-3
    assert (region_map(*given_, by_head=True, **view) - truth).abs().max() > 1e-3
    assert float(truth.sum(-1).max()) <= 1 + 1e-9
    assert float(truth.sum(-1).min()) < 0.9


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 2000))
def test_chunks_change_nothing_and_bound_the_memory(seed: int, chunk: int) -> None:
    query, key, segments, columns, rows = drawn(seed)
    lse = log_sum_exp(query, key, rows=rows, scale=0.7, segments=segments, backend="torch")
    given_ = (query, key, columns, int(columns.max()) + 1, rows, lse)
    whole = region_map(*given_, scale=0.7, segments=segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region_scores, "CHUNK", chunk)
        assert (region_map(*given_, scale=0.7, segments=segments) - whole).abs().max() < 1e-6
        parts = list(region_scores.region_scores(query, key, columns >= 0, rows, scale=0.7, segments=segments))
    one_row = max(len(part.keys) for part in parts) * query.shape[1]
    assert max(part.scores.numel() for part in parts) <= max(chunk, one_row)
    assert torch.equal(torch.cat([part.places for part in parts]), torch.arange(len(rows)))


def test_a_region_without_tokens_is_a_map_of_zeros() -> None:
    query, key, _, columns, rows = drawn(1)
    lse = torch.zeros(len(rows), 4)
    assert torch.equal(region_map(query, key, torch.full_like(columns, -1), 1, rows, lse, scale=1.0).sum(), lse.sum())


def test_readings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="is a mean"):
        Reading("mass", by_head=True)
    with pytest.raises(ValueError, match="choose mass, image_entropy, image_map"):
        Reading("masses")  # type: ignore[arg-type]
