"""Gradients of attention_mass: the closed form against autograd through the definition, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_mass_cases import VARIANTS, Case, case, worst
from torch import Tensor

from rl_lvr.ops.attention_mass import attention_entropy, attention_mass, attention_mass_flash, log_sum_exp, reference

Pair = tuple[Tensor, Tensor]


def layer(variant: str) -> Case:
    given = case(variant).to(torch.float64)
    given.query.requires_grad_()
    given.key.requires_grad_()
    return given


def gradients(given: Case, values: Tensor) -> Pair:
    """Of a fixed random weighting of `values`, with respect to query and key."""
    weighting = torch.randn(values.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    query, key = torch.autograd.grad((values * weighting).sum(), (given.query, given.key), retain_graph=True)
    return query, key


def close(ours: Pair, truth: Pair, bound: float = 1e-12) -> bool:
    return all(a.isfinite().all() and worst(a, b) <= bound for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("path", ["A", "B"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mass(variant: str, path: str) -> None:
    given = layer(variant)
    truth = gradients(given, given.exact())
    for backend in ("reference", "torch"):
        assert close(gradients(given, given.mass(backend, path)), truth)
    assert not close(gradients(given, given.mass("torch", path).flip(-1)), truth, 1e-3)  # control: regions swapped


@pytest.mark.parametrize("variant", ["rows", "sinks"])
def test_sums(variant: str) -> None:
    given = layer(variant)
    exact = given.exact()
    weights = torch.rand(len(exact), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sequence = given.problem.all_rows() // given.query.shape[2]
    per_head = torch.zeros(2, *exact.shape[1:], dtype=torch.float64)
    per_head = per_head.index_add(0, sequence, exact * weights[:, None, None])
    for path in ("A", "B"):
        reduced = given.reduced(weights, "torch", path)
        assert close(gradients(given, reduced.per_query), gradients(given, exact.mean(1)))
        assert close(gradients(given, reduced.per_head), gradients(given, per_head))


@pytest.mark.parametrize("variant", ["plain", "window", "softcap"])
def test_entropy_and_log_sum_exp(variant: str) -> None:
    given = layer(variant)
    lse, entropy = reference.statistics(given.problem)
    ours = attention_entropy(given.query, given.key, backend="torch", **given.asked)
    assert close(gradients(given, ours), gradients(given, entropy))
    assert not close(gradients(given, ours), gradients(given, lse.masked_fill(lse.isneginf(), 0.0)), 1e-3)
    ours = log_sum_exp(given.query, given.key, backend="torch", **given.asked)
    seen = lse.isfinite()
    assert close(gradients(given, ours[seen]), gradients(given, lse[seen]))


def numerical(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    inputs = [torch.randn(1, n, 4, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1)]
    return torch.autograd.gradcheck(loss, inputs, raise_exception=False)


def test_finite_differences_agree() -> None:
    labels = torch.tensor([[0, 1, 0, -1]])

    def mass(query: Tensor, key: Tensor) -> Tensor:
        return attention_mass(query, key, labels, 2, scale=0.7, backend="torch")

    assert numerical(mass)
    assert not numerical(lambda query, key: mass(query, key.detach()) + 0.0 * key.sum())  # control: keys forgotten


def test_a_given_log_sum_exp_counts_as_a_function_of_query_and_key() -> None:
    """Holding it constant, as attention kernels that hide its gradient do, gives another gradient."""
    given = layer("plain")
    s = reference.scores(given.problem)
    p = torch.exp(s - reference.log_sum_exp(given.problem).detach()[..., None])
    held = torch.stack([(p * (given.labels == r)[:, None, None]).sum(-1) for r in range(3)], -1)
    assert worst(reference.select(given.problem, held), given.exact()) <= 1e-12
    ours = gradients(given, given.mass("torch", "A"))
    assert not close(ours, gradients(given, reference.select(given.problem, held)), 1e-3)


def test_what_nobody_sees_may_be_nan() -> None:
    clean, poisoned = layer("padded"), layer("padded")
    padding = clean.asked["segments"] < 0
    with torch.no_grad():
        poisoned.key.masked_fill_(padding[:, None, :, None], float("nan"))
        poisoned.query.masked_fill_(padding[:, None, -37:, None], float("nan"))
    for path in ("A", "B"):
        ours = gradients(poisoned, poisoned.mass("torch", path))
        assert close(ours, gradients(clean, clean.mass("torch", path)))
        assert all(g.any() for g in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    """At most twice the error of eager attention in the same precision. The truth is the float64 gradient of the same
    numbers, not rounded to theirs."""
    given = case("padded").to(dtype)
    exact = given.to(torch.float64)
    for leaf in (given.query, given.key, exact.query, exact.key):
        leaf.requires_grad_()
    truth = gradients(exact, exact.exact())
    ours, plain = (gradients(given, mass.double()) for mass in (given.mass("torch"), given.plain()))
    assert all(gradient.dtype == dtype for gradient in ours)
    for mine, eager, true in zip(ours, plain, truth, strict=True):
        assert worst(mine, true) <= 2 * worst(eager, true) + 1e-6
    if dtype == torch.bfloat16:
        assert worst(ours[0], truth[0]) > 1e-4  # control: the truth is not rounded as well


@pytest.mark.parametrize("variant", ["plain", "rows", "padded", "window"])
def test_one_hot_values_through_stock_attention(variant: str) -> None:
    given = layer(variant)
    ours = attention_mass_flash(given.query, given.key, given.labels, 3, **given.asked)
    truth = given.exact()
    assert worst(ours, truth) <= 1e-12
    assert close(gradients(given, ours), gradients(given, truth))
    wrong = attention_mass_flash(given.query, given.key, given.labels.roll(1, 1), 3, **given.asked)
    assert worst(wrong, truth) > 1e-3


def test_one_hot_values_need_a_column_per_region() -> None:
    given = case(width=12)
    with pytest.raises(ValueError, match=r"13 regions do not fit 12 value columns"):
        attention_mass_flash(given.query, given.key, given.labels, 13, scale=1.0)
