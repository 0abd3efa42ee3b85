"""Values of vocab_stats against float64: shapes, precisions, hostile logits, what must not change them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vocab_stats_cases import FLOATS, case, from_logits, here, plain, worst

from rl_lvr.ops.vocab_stats import VocabStats, vocab_stats

EPSILON = 2e-6


@pytest.fixture
def backend() -> str:
    return here()


@pytest.mark.parametrize("shape", [(1, 8, 7), (6, 16, 1003), (5, 12, 4100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(
    backend: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    given = case(*shape).to(dtype)
    truth, ours, theirs = given.run("reference"), given.run(backend), plain(given.logits(), given)
    assert torch.equal(ours.top1_id, truth.top1_id)
    for name in FLOATS:
        assert getattr(ours, name).dtype == torch.float32
        assert worst(ours, truth, name) <= 2 * worst(theirs, truth, name) + EPSILON, name


def test_what_the_comparison_would_catch(backend: str) -> None:
    """Control: one zero row too many at the end of the vocabulary, as from an unmasked block (verl#5349)."""
    given = case(sharpness=0.1)
    a, b, scaling = given.asked["lora"]
    padded = vocab_stats(
        given.hidden,
        torch.cat([given.weight, torch.zeros(1, 16)]),
        bias=torch.cat([given.asked["bias"], torch.zeros(1)]),
        lora=(a, torch.cat([b, torch.zeros(1, 4)]), scaling),
        temperature=given.asked["temperature"],
        backend=backend,
    )
    truth, theirs = given.run("reference"), plain(given.logits(), given)
    assert worst(padded, truth, "log_z") > 2 * worst(theirs, truth, "log_z") + EPSILON


def test_what_is_not_asked_for_is_none(backend: str) -> None:
    given = case()
    stats = vocab_stats(given.hidden, given.weight, backend=backend)
    assert stats.topk_mass is stats.topk_mean_logprob is stats.kl_next is stats.chosen_logprob is None
    assert stats.entropy.shape == (6,)


def test_no_rows(backend: str) -> None:
    stats = case(rows=0).run(backend)
    assert all(getattr(stats, name).shape == (0,) for name in FLOATS)


# --- hostile logits ------------------------------------------------------------------------------------


def hostile_rows(vocabulary: int = 5003) -> dict[str, Tensor]:
    crowd = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    sure, huge, tied, last = crowd.clone(), crowd.clone(), crowd.clone().clamp(max=1.5), crowd.clone()
    sure[4097] = 100.0
    huge[3] = 1e4
    tied[[2, 4096, 5000]] = 2.0
    last[-1] = 12.0
    return {
        "all_negative": crowd - 50,
        "all_minus_1e4": crowd / 4 - 1e4,
        "all_plus_1e4": crowd / 4 + 1e4,
        "one_hot": sure,
        "one_at_1e4": huge,
        "ties_at_the_maximum": tied,
        "uniform": torch.zeros(vocabulary),
        "maximum_in_the_last_place": last,
        "rising": torch.linspace(-20, 5, vocabulary),
        "falling": torch.linspace(5, -20, vocabulary),
    }


@pytest.mark.parametrize("name", hostile_rows())
def test_hostile_logits(backend: str, name: str) -> None:
    logits = torch.stack([hostile_rows()[name], hostile_rows()["falling"]])
    asked = {"top_k": 5, "next_row": torch.tensor([True, False]), "chosen": torch.tensor([4999, 0])}
    ours = vocab_stats(*from_logits(logits), **asked, backend=backend, workspace_bytes=2 * 4 * 4096)
    truth = vocab_stats(*from_logits(logits), **asked, backend="reference")
    assert torch.equal(ours.top1_id, truth.top1_id)
    for field in FLOATS:
        torch.testing.assert_close(getattr(ours, field), getattr(truth, field), rtol=2e-6, atol=1e-38, msg=field)


def test_banned_ids(backend: str) -> None:
    """At -inf: as if they were not in the vocabulary, in a whole block, in front, at the end, all but one."""
    logits = torch.stack([hostile_rows()["rising"], hostile_rows()["falling"]])
    hidden, weight = from_logits(logits)
    follows = torch.tensor([True, False])
    for allowed in (slice(4096, 5003), slice(0, 4096), slice(100, 300), slice(7, 8)):
        bias = torch.full((5003,), -torch.inf)
        bias[allowed] = 0.0
        chosen = torch.full((2,), allowed.start)
        stats = vocab_stats(hidden, weight, bias=bias, next_row=follows, chosen=chosen, backend=backend)
        truth = vocab_stats(hidden, weight[allowed], next_row=follows, chosen=chosen * 0, backend="reference")
        assert torch.equal(stats.top1_id, truth.top1_id + allowed.start)
        for field in ("log_z", "entropy", "not_top1", "renyi2", "kl_next", "chosen_logprob"):
            torch.testing.assert_close(getattr(stats, field), getattr(truth, field), rtol=2e-6, atol=1e-7, msg=field)
        outside = torch.full((2,), allowed.stop % 5003)
        banned = vocab_stats(hidden, weight, bias=bias, chosen=outside, top_k=64, backend=backend)
        assert (banned.chosen_logprob == -torch.inf).all()
        assert (banned.topk_mass <= 1 + 1e-6).all()


def test_divergence_from_a_row_that_bans_what_this_one_may_do(backend: str) -> None:
    hidden, weight = torch.tensor([[0.0], [1.0], [0.5]]), torch.zeros(9, 1)
    weight[4] = -3e38  # -inf over the temperature
    follows = torch.tensor([True, True, False])
    stats = vocab_stats(hidden, weight, next_row=follows, temperature=0.5, backend=backend)
    assert stats.kl_next[0] == torch.inf
    assert stats.kl_next[1:].tolist() == [0.0, 0.0]


def test_a_broken_row_is_nan_and_alone(backend: str) -> None:
    given = case()
    broken = given.hidden.clone()
    broken[3, 0] = torch.nan
    stats = vocab_stats(broken, given.weight, **given.asked, backend=backend)
    whole = given.run(backend)
    others = torch.tensor([0, 1, 2, 4, 5])
    for name in ("log_z", "entropy", "top1", "not_top1", "renyi2", "chosen_logprob", "kl_next"):
        values = getattr(stats, name)
        assert values[3].isnan(), name
        assert torch.equal(values[others], getattr(whole, name)[others]), name


def test_unwritten_memory_is_not_read(backend: str) -> None:
    given = case(vocabulary=300)
    expected = given.run(backend)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        poisoned = given.run(backend, workspace_bytes=6 * 4 * 128)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in FLOATS:
        torch.testing.assert_close(getattr(poisoned, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


# --- what must not change them -------------------------------------------------------------------------


def grid_logits(rows: int, vocabulary: int) -> Tensor:
    """Multiples of 1/8, which float32 adds without rounding."""
    random = torch.Generator().manual_seed(2)
    return torch.randint(-80, 80, (rows, vocabulary), generator=random) / 8


def test_shift(backend: str) -> None:
    hidden, weight = from_logits(grid_logits(4, 5000))
    follows = torch.tensor([True, True, True, False])
    plain_stats = vocab_stats(hidden, weight, top_k=3, next_row=follows, backend=backend)
    shifted = vocab_stats(hidden, weight, bias=torch.full((5000,), 512.0), top_k=3, next_row=follows, backend=backend)
    for name in ("entropy", "top1", "not_top1", "renyi2", "topk_mass", "topk_mean_logprob", "kl_next"):
        assert torch.equal(getattr(plain_stats, name), getattr(shifted, name)), name
    torch.testing.assert_close(shifted.log_z - 512, plain_stats.log_z, rtol=0, atol=1e-4)


def test_order_of_the_vocabulary(backend: str) -> None:
    given = case()
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(3))
    a, b, scaling = given.asked["lora"]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(1003))
    changes = {
        "bias": given.asked["bias"][order],
        "lora": (a, b[order], scaling),
        "chosen": place[given.asked["chosen"]],
    }
    shuffled = vocab_stats(given.hidden, given.weight[order], **{**given.asked, **changes}, backend=backend)
    straight = given.run(backend)
    assert torch.equal(order[shuffled.top1_id], straight.top1_id)
    for name in FLOATS:
        torch.testing.assert_close(getattr(shuffled, name), getattr(straight, name), rtol=1e-5, atol=1e-5)
    unmoved = vocab_stats(given.hidden, given.weight[order], **given.asked, backend=backend)
    assert not torch.allclose(unmoved.entropy, straight.entropy, atol=1e-3)  # control: bias and adapter stayed


def exact_rows(rows: int) -> tuple[Tensor, Tensor]:
    """Small integers: the matrix product is exact in whatever order it is summed."""
    random = torch.Generator().manual_seed(4)
    return torch.randint(-3, 4, (rows, 8), generator=random) / 2, torch.randint(-3, 4, (9000, 8), generator=random) / 1


def test_a_row_does_not_depend_on_its_company(backend: str) -> None:
    hidden, weight = exact_rows(7)
    together = vocab_stats(hidden, weight, top_k=8, backend=backend)
    alone = vocab_stats(hidden[4:5], weight, top_k=8, backend=backend)
    for name in ("log_z", "entropy", "not_top1", "renyi2", "topk_mass", "topk_mean_logprob"):
        assert torch.equal(getattr(together, name)[4:5], getattr(alone, name)), name


def assert_close(one: VocabStats, other: VocabStats) -> None:
    for name in FLOATS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("workspace", [1, 6 * 4 * 130, 3 * 4 * 1024, 6 * 4 * 4096])
def test_size_of_the_workspace(backend: str, workspace: int) -> None:
    """One id per slice, several slices, rows in two parts (with a span across the cut), everything at once."""
    given = case(vocabulary=1500 if workspace == 1 else 5003)
    assert_close(given.run(backend, workspace_bytes=workspace), given.run(backend))


def test_autocast(backend: str) -> None:
    """Which would round the logits to bf16, were it heard."""
    given = case()
    with torch.autocast("cpu", torch.bfloat16):
        assert (given.hidden @ given.weight.T).dtype == torch.bfloat16
        assert_close(given.run(backend), case().run("reference"))
