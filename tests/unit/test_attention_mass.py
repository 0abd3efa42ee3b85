"""Values of attention_mass against float64: options, precisions, hostile inputs, what must not change them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_mass_cases import VARIANTS, Case, case, here, padded_and_packed, worst
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lvr.ops.attention_mass import attention_entropy, attention_mass, labelled_positions, log_sum_exp, reference

EPSILON = 2e-6
PATHS = pytest.mark.parametrize("path", ["A", "B"])


@pytest.fixture
def backend() -> str:
    return here()


@PATHS
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(backend: str, dtype: torch.dtype, variant: str, path: str) -> None:
    given = case(variant).to(dtype)
    ours, truth = given.mass(backend, path), given.exact()
    assert ours.dtype == torch.float32
    assert ours.shape == truth.shape
    assert worst(ours, truth) <= 2 * worst(given.plain(), truth) + EPSILON
    assert worst(ours, truth) <= 1e-5  # products of bf16 are exact in float32: the rule alone would allow 1e-2


@PATHS
def test_what_the_comparison_would_catch(backend: str, path: str) -> None:
    """Controls: a region that begins one key late, the neighbour's key head, and padding that is attended to."""
    given, bound = case("padded"), 1e-3
    truth = given.exact()
    shifted = replace(given, labels=given.labels.roll(1, dims=1))
    assert worst(shifted.mass(backend, path), truth) > bound
    assert worst(replace(given, key=given.key.flip(1)).mass(backend, path), truth) > bound
    assert worst(given.but(segments=None).mass(backend, path), truth) > bound


@PATHS
@pytest.mark.parametrize("variant", ["rows", "window", "sinks"])
def test_sums_over_heads_and_queries(backend: str, variant: str, path: str) -> None:
    given = case(variant, batch=3)
    truth = given.exact()
    weights = torch.rand(len(truth), generator=torch.Generator().manual_seed(1))
    reduced = given.reduced(weights, backend, path)
    assert worst(reduced.per_query, truth.mean(1)) <= 1e-6
    sequence = given.problem.all_rows() // given.query.shape[2]
    per_head = torch.zeros(3, truth.shape[1], 3, dtype=torch.float64)
    per_head.index_add_(0, sequence, truth * weights[:, None, None])
    assert worst(reduced.per_head, per_head) <= 1e-5
    assert worst(reduced.per_head.flip(0), per_head) > 1e-2  # control: sums of another sequence


@pytest.mark.parametrize("variant", ["plain", "window", "softcap"])
def test_entropy_and_log_sum_exp(backend: str, variant: str) -> None:
    given = case(variant)
    lse, entropy = reference.statistics(given.problem)
    ours = log_sum_exp(given.query, given.key, backend=backend, **given.asked)
    seen = lse.isfinite()
    assert torch.equal(ours.isneginf(), ~seen)
    assert worst(ours[seen], lse[seen]) <= 2e-6
    assert worst(attention_entropy(given.query, given.key, backend=backend, **given.asked), entropy) <= 3e-6


def test_log_sum_exp_is_that_of_torch_with_a_sink_as_one_more_logit(backend: str) -> None:
    given = case("sinks")
    s = reference.scores(given.problem)
    sink = given.asked["sinks"].double()[given.asked["heads"]][:, None, None].expand(*s.shape[:-1], 1)
    expected = reference.select(given.problem, torch.logsumexp(torch.cat([s, sink], -1), -1))
    assert worst(log_sum_exp(given.query, given.key, backend=backend, **given.asked), expected) <= 2e-6


@pytest.mark.parametrize("gap", [5, 10, 15, 20])
def test_entropy_of_a_row_that_looks_at_one_key(backend: str, gap: int) -> None:
    """Scores are whole numbers, so that only the softmax is tested. logZ - sum(p s) is the control."""
    query, key = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 70, 16)
    key[..., 33, 0] = gap
    exact = attention_entropy(query, key, scale=1.0, backend="reference")
    relative = worst(attention_entropy(query, key, scale=1.0, backend=backend), exact) / float(exact)
    assert relative <= 1e-5
    s = (query @ key.mT).flatten()
    plain = torch.logsumexp(s, 0) - (torch.softmax(s, 0) * s).sum()
    assert gap < 15 or worst(plain, exact) / float(exact) > 1e-3


@PATHS
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_huge_and_all_negative_scores(backend: str, path: str, shift: float) -> None:
    """All scores of a row move by the same number, which changes no weight."""
    given = case(keys=37)
    query, key = (torch.cat([x, torch.ones(*x.shape[:-1], 4)], -1) for x in (given.query, given.key))
    key[..., -1] = shift / given.asked["scale"]
    query[..., -4:-1] = 0.0
    moved = replace(given, query=query, key=key)
    # An fp32 score near 1e4 is known to 1e-3: compared with float64 of what fp32 holds, by the rule of the first test.
    truth, plain = moved.exact(), moved.plain()
    ours = moved.mass(backend, path)
    assert torch.isfinite(ours).all()
    assert worst(truth, given.exact()) <= 1e-6
    allowed = 2 * worst(plain, truth) if path == "B" else 4e-3  # path A also takes over the rounding of its lse
    assert worst(ours, truth) <= allowed + EPSILON


@PATHS
def test_one_hot_rows(backend: str, path: str) -> None:
    given = case(sharpness=1e3)
    ours, truth = given.mass(backend, path), given.exact()
    assert ((truth < 1e-6) | (truth > 1 - 1e-6)).double().mean() > 0.9
    decided = (truth < 1e-6) | (truth > 1 - 1e-6)
    assert worst(ours[decided], truth[decided]) <= 4e-3


@PATHS
def test_what_nobody_sees_may_be_nan_and_rows_without_keys_are_zero(backend: str, path: str) -> None:
    given = case("padded")
    padding = given.asked["segments"] < 0
    truth, poisoned_key, poisoned_query = given.exact(), given.key.clone(), given.query.clone()
    poisoned_key.masked_fill_(padding[:, None, :, None], float("nan"))
    no_key = padding[:, -given.query.shape[2] :]
    poisoned_query.masked_fill_(no_key[:, None, :, None], float("nan"))
    lse = given.lse("torch").masked_fill(no_key[:, None], 0.0)  # what torch's CPU kernel returns for such a row
    asked = {**given.asked, "lse": lse} if path == "A" else given.asked
    ours = attention_mass(poisoned_query, poisoned_key, given.labels, 3, backend=backend, **asked)
    assert worst(ours, truth) <= 1e-6
    assert bool((ours[no_key.flatten()] == 0).all())
    assert no_key.any()
    poisoned_key[~padding[:, None, :, None].expand_as(poisoned_key)] = float("nan")
    broken = attention_mass(given.query, poisoned_key, given.labels, 3, backend=backend, **asked)
    assert broken.isnan().any()  # control: a visible NaN is not hidden
    assert attention_entropy(given.query, poisoned_key, backend=backend, **given.asked).isnan().any()


@PATHS
def test_every_entry_of_the_result_is_written(backend: str, path: str) -> None:
    """Fresh memory is filled with NaN."""
    given = case("window", queries=33, keys=33).but(rows=torch.arange(0, 66, 3))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all()
        ours, reduced = given.mass(backend, path), given.reduced(torch.ones(22), backend, path)
        entropy = attention_entropy(given.query, given.key, backend=backend, **given.asked)
    finally:
        torch.use_deterministic_algorithms(False)
    for values in (ours, reduced.per_query, reduced.per_head, entropy):
        assert torch.isfinite(values).all()
    assert worst(ours, given.exact()) <= 1e-6


@PATHS
def test_autocast(backend: str, path: str) -> None:
    """Which would round the scores to bf16, were it heard."""
    given = case("softcap").but(heads=None)
    weights = torch.ones(len(given.exact()))
    lse, entropy = reference.statistics(given.problem)
    with torch.autocast("cpu", torch.bfloat16):
        assert (given.query @ given.query.mT).dtype == torch.bfloat16
        ours, reduced = given.mass(backend, path), given.reduced(weights, backend, path)
        assert worst(log_sum_exp(given.query, given.key, backend=backend, **given.asked), lse) <= 2e-6
        assert worst(attention_entropy(given.query, given.key, backend=backend, **given.asked), entropy) <= 3e-6
    assert worst(ours, given.exact()) <= 1e-6
    assert worst(reduced.per_query, given.exact().mean(1)) <= 1e-6
    assert worst(reduced.per_head.sum(0), given.exact().sum(0)) <= 2e-5


@PATHS
def test_all_keys_labelled_add_up_to_one(backend: str, path: str) -> None:
    given = case()
    labels = torch.arange(given.key.shape[2]).remainder(3).expand(2, -1)
    total = replace(given, labels=labels).mass(backend, path).sum(-1)
    assert worst(total, torch.ones_like(total)) <= 2e-6
    assert worst(given.mass(backend, path).sum(-1), torch.ones_like(total)) > 0.1  # control: most keys have no label


@PATHS
def test_order_of_the_keys_does_not_matter(backend: str, path: str) -> None:
    """Keys before the first query may change places with their labels; without their labels they may not."""
    given = case(keys=90, queries=20)
    order = torch.cat([torch.randperm(60, generator=torch.Generator().manual_seed(2)), torch.arange(60, 90)])
    moved = replace(given, key=given.key[:, :, order], labels=given.labels[:, order])
    expected = given.mass(backend, path)
    assert worst(moved.mass(backend, path), expected) <= 1e-6
    assert worst(replace(moved, labels=given.labels).mass(backend, path), expected) > 1e-3


@PATHS
def test_a_sequence_and_a_head_are_the_same_alone(backend: str, path: str) -> None:
    given = case("padded", batch=3)
    whole = given.mass(backend, path).unflatten(0, (3, -1))
    alone = Case(given.query[1:2], given.key[1:2], given.labels[1:2], 3, given.asked)
    alone = alone.but(segments=given.asked["segments"][1:2])
    assert worst(alone.mass(backend, path), whole[1]) <= 5e-7
    assert worst(given.but(heads=[4]).mass(backend, path), whole.flatten(0, 1)[:, 4:5]) <= 5e-7
    assert worst(alone.mass(backend, path), whole[0]) > 1e-2


def test_no_labelled_key_and_no_row(backend: str) -> None:
    given = case()
    none = replace(given, labels=torch.full_like(given.labels, -1))
    for path in ("A", "B"):
        assert not none.mass(backend, path).any()
        assert given.but(rows=torch.zeros(0, dtype=torch.long)).mass(backend, path).shape == (0, 6, 3)
    assert not none.reduced(torch.ones(74), backend, "A").per_head.any()


def test_labelled_positions() -> None:
    labels = torch.tensor([[-1, 0, -1, 2], [1, -1, -1, -1], [-1, -1, -1, -1]])
    assert labelled_positions(labels).tolist() == [[1, 3], [0, -1], [-1, -1]]
    assert labelled_positions(labels[2:]).shape == (1, 0)


@st.composite
def layers(draw: st.DrawFn) -> Case:
    batch, group, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries = draw(st.integers(1, 20))
    keys = queries + draw(st.integers(0, 12))
    seed = draw(st.integers(0, 1000))
    random = torch.Generator().manual_seed(seed)
    heads = draw(st.lists(st.integers(0, group * key_heads - 1), min_size=1, unique=True))
    rows: Tensor | None = torch.rand(batch * queries, generator=random).lt(0.5).nonzero()[:, 0]
    width = draw(st.sampled_from([4, 16, 20]))
    given = case(batch=batch, heads=(group * key_heads, key_heads), queries=queries, keys=max(keys, 4), width=width)
    asked = {
        "scale": 0.5,
        "heads": draw(st.sampled_from([None, heads])),
        "rows": draw(st.sampled_from([None, rows])),
        "segments": draw(st.sampled_from([None, padded_and_packed(batch, max(keys, 4))])),
        "window": draw(st.sampled_from([None, 1, 5])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    labels = torch.randint(-2, 3, given.labels.shape, generator=random)
    return Case(given.query, given.key, labels, 3, asked)


@settings(max_examples=8 if here() == "triton" else 60)
@given(layers())
def test_any_shape(layer: Case) -> None:
    truth = layer.exact()
    for path in ("A", "B"):
        ours = layer.mass(here(), path)
        assert ours.shape == truth.shape
        assert not ours.numel() or worst(ours, truth) <= 2e-6
