"""The algebra of partial statistics, and a vocabulary split over slices, shards and processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vocab_stats_cases import FLOATS, case, from_logits

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import Partial, finish, merge, partial_stats, vocab_stats
from rl_lvr.ops.vocab_stats.partial import empty

NUMBERS = st.one_of(
    st.floats(-30, 30, width=32), st.sampled_from([0.0, 1.0, -1e4, 1e4, -80.0, 40.0])
)  # with ties and with gaps that underflow
FOLLOWS = torch.tensor([True, True, False])


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    width = draw(st.integers(3, 12))
    rows = draw(st.lists(st.lists(NUMBERS, min_size=width, max_size=width), min_size=3, max_size=3))
    return torch.tensor(rows)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Logits [3, V] and the borders of three parts of the vocabulary."""
    values = draw(logits())
    first = draw(st.integers(1, values.shape[1] - 2))
    second = draw(st.integers(first + 1, values.shape[1] - 1))
    return values, [0, first, second, values.shape[1]]


def part(values: Tensor, start: int, stop: int) -> Partial:
    hidden, weight = from_logits(values)
    chosen = torch.tensor([0, 1, 2])
    return partial_stats(hidden, weight[start:stop], start, chosen=chosen, next_row=FOLLOWS, top_k=1)


def assert_same(a: Partial, b: Partial, *, exactly: bool = False) -> None:
    """Up to rounding, and up to which of equal logits is among the top-k."""
    for field in fields(Partial):
        if field.name == "top_ids" and not exactly:
            continue
        one, other = getattr(a, field.name), getattr(b, field.name)
        slack = 3e-5 if field.name == "cross" else 1e-30  # the terms of `cross` have both signs
        rtol, atol = (0.0, 0.0) if exactly else (3e-6, slack)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=field.name)


def assert_points_at_its_values(part: Partial, values: Tensor) -> None:
    assert torch.equal(values.gather(1, part.top_ids), part.top_values)
    assert torch.equal(values.gather(1, part.argmax[:, None])[:, 0], part.maximum)


@settings(max_examples=60)
@given(cuts())
def test_merge_is_associative_commutative_and_complete(drawn: tuple[Tensor, list[int]]) -> None:
    values, borders = drawn
    a, b, c = (part(values, *pair) for pair in pairwise(borders))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(a, b), merge(b, a))
    whole = merge(merge(c, a), b)
    assert_same(whole, part(values, 0, values.shape[1]))
    assert_points_at_its_values(whole, values)


@settings(max_examples=30)
@given(logits())
def test_the_empty_set_is_the_identity(values: Tensor) -> None:
    whole = part(values, 0, values.shape[1])
    nothing = empty(3, 1, whole.maximum.device, whole.maximum.dtype)
    assert_same(merge(whole, nothing), whole, exactly=True)
    assert_same(merge(nothing, whole), whole, exactly=True)
    assert_same(merge(nothing, nothing), nothing, exactly=True)


def test_an_id_in_two_parts_is_counted_twice() -> None:
    """Control of the laws above: they do not hold for sets that overlap."""
    values = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    overlapping = merge(part(values, 0, 6), part(values, 5, 9))
    with pytest.raises(AssertionError):
        assert_same(overlapping, part(values, 0, 9))


def test_shards_of_a_head_make_the_whole() -> None:
    whole = case()
    truth = whole.run("torch")
    a, b, scaling = whole.asked["lora"]
    shards = []
    for ids in (slice(0, 400), slice(400, 401 + 64), slice(465, 1003)):
        asked = {**whole.asked, "bias": whole.asked["bias"][ids], "lora": (a, b[ids], scaling)}
        shards.append(partial_stats(whole.hidden, whole.weight[ids], ids.start, **asked))
    merged = finish(merge(shards[2], merge(shards[0], shards[1])), next_row=whole.asked["next_row"], with_chosen=True)
    assert torch.equal(merged.top1_id, truth.top1_id)
    for name in FLOATS:
        torch.testing.assert_close(getattr(merged, name), getattr(truth, name), rtol=1e-5, atol=1e-5)
    lost = finish(merge(shards[0], shards[1]), next_row=whole.asked["next_row"])
    assert not torch.allclose(lost.log_z, truth.log_z, atol=1e-3)


def test_the_reference_has_no_shards() -> None:
    with pytest.raises(UserError, match="needs the whole vocabulary"):
        partial_stats(torch.randn(2, 4), torch.randn(8, 4), 0, backend="reference")


WORKER = """
import sys, torch, torch.distributed as dist
from rl_lvr.ops.vocab_stats import finish, merge_shards, partial_stats
rank, ranks, store, out = int(sys.argv[1]), 2, sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
torch.manual_seed(0)
hidden, weight = torch.randn(4, 8), torch.randn(501, 8)
chosen, follows = torch.tensor([0, 250, 251, 500]), torch.tensor([True, True, True, False])
start = (0, 251)[rank]
mine = weight[start : (251, 501)[rank]]
part = merge_shards(partial_stats(hidden, mine, start, chosen=chosen, next_row=follows, top_k=5))
stats = finish(part, next_row=follows, with_chosen=True)
torch.save({name: value for name, value in vars(stats).items()}, f"{out}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_with_half_a_vocabulary_each(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WORKER]
    started = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store"), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8), torch.randn(501, 8)
    chosen, follows = torch.tensor([0, 250, 251, 500]), torch.tensor([True, True, True, False])
    truth = vocab_stats(hidden, weight, chosen=chosen, next_row=follows, top_k=5, backend="reference")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in (*FLOATS, "top1_id"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], getattr(truth, name), rtol=1e-5, atol=1e-5, msg=name)
