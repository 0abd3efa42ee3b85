"""Intervals and tests against statsmodels, brute force and simulated truth."""

from __future__ import annotations

import importlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats import contingency_tables, multitest
from statsmodels.stats.proportion import proportion_confint

from rl_lvr.evaluation.statistics import (
    Interval,
    holm,
    mcnemar_exact,
    mcnemar_mid_p,
    paired,
    pass_at_k,
    proportion,
    sign_flip,
    tango,
    wilson,
)


def near(found: Interval, low: float, high: float, tolerance: float = 1e-9) -> bool:
    return abs(found.low - low) < tolerance and abs(found.high - high) < tolerance


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 11), (150, 191), (1, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_that_of_statsmodels(right: int, n: int, level: float) -> None:
    assert near(wilson(right, n, level), *proportion_confint(right, n, 1 - level, "wilson"))


def restricted_score(b: float, c: float, n: float, d: float) -> float:
    """Tango's statistic, its nuisance found by maximising the trinomial likelihood under p10 - p01 = d numerically."""

    def loss(p01: float) -> float:
        cells = (p01 + d, p01, 1 - d - 2 * p01)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in zip((b, c, n - b - c), cells, strict=True) if k)

    bounds = (max(0.0, -d), (1 - d) / 2)
    p01 = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * d) / math.sqrt(n * (2 * p01 + d - d * d))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 4, 50), (4, 12, 50), (1, 1, 200), (9, 0, 44), (30, 29, 100)])
def test_tango_inverts_the_score_test(b: int, c: int, n: int) -> None:
    found = tango(b, c, n)
    z = stats.norm.ppf(0.975)
    assert restricted_score(b, c, n, found.low) == pytest.approx(z, abs=2e-4)
    assert restricted_score(b, c, n, found.high) == pytest.approx(-z, abs=2e-4)
    assert near(tango(c, b, n), -found.high, -found.low)
    assert found.low < (b - c) / n < found.high


def test_tango_at_its_edges() -> None:
    for b, c in ((0, 0), (40, 0), (0, 40)):
        found = tango(b, c, 40)
        assert -1 <= found.low <= (b - c) / 40 <= found.high <= 1
        assert found.high > found.low
    assert near(tango(0, 0, 40), -tango(0, 0, 40).high, tango(0, 0, 40).high)
    assert tango(0, 0, 0) == Interval(-1, 1)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 5), (1, 0), (3, 11), (40, 21), (0, 12)])
def test_mcnemar(b: int, c: int) -> None:
    exact = contingency_tables.mcnemar([[10, b], [c, 10]], exact=True).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, exact))
    chances = stats.binom.pmf(np.arange(b + c + 1), b + c, 0.5)
    apart = np.abs(2 * np.arange(b + c + 1) - (b + c))
    further, same = chances[apart > abs(b - c)].sum(), chances[apart == abs(b - c)].sum()
    assert mcnemar_mid_p(b, c) == pytest.approx(further + same / 2 if b + c else 1.0)
    assert sign_flip([1] * b + [-1] * c + [0] * 7) == pytest.approx(mcnemar_exact(b, c))


@pytest.mark.parametrize("sums", [[3, -1, 2, 2, 0, 1], [1.5, -0.5, 2.0, 0.25, 1.0, -1.0, 2.0, 0.75]])
def test_sign_flips_are_all_combinations(sums: list[float]) -> None:
    combinations = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    wanted = float((np.abs(combinations @ np.array(sums)) >= abs(sum(sums)) - 1e-9).mean())
    whole = all(float(s).is_integer() for s in sums)
    assert sign_flip(sums) == pytest.approx(wanted, abs=1e-12 if whole else 0.01)


def test_holm_is_that_of_statsmodels() -> None:
    for p in ([0.01, 0.04, 0.03, 0.2], [0.5], [0.04, 0.04, 1.0], []):
        wanted = multitest.multipletests(p, method="holm")[1].tolist() if p else []
        assert holm(p) == pytest.approx(wanted)


def test_the_chance_of_one_right_sample() -> None:
    for right, k in itertools.product(range(6), (1, 2, 5)):
        draws = list(itertools.combinations([True] * right + [False] * (5 - right), k))
        assert pass_at_k(right, 5, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    with pytest.raises(ValueError, match="k is 6"):
        pass_at_k(1, 5, 6)


def test_rows_that_are_alike_count_once() -> None:
    draws = np.random.default_rng(0)
    first, second = draws.random((2, 200)) < np.array([[0.7], [0.5]])
    names = np.repeat(np.arange(200), 4).tolist()
    thrice = [np.repeat(row, 4) for row in (first, second)]
    once, grouped, rows = paired(first, second), paired(*thrice, names), paired(*thrice)
    assert once.difference == grouped.difference
    width = {name: found.interval.high - found.interval.low for name, found in
             (("once", once), ("grouped", grouped), ("rows", rows))}  # fmt: skip
    assert width["grouped"] == pytest.approx(width["once"], rel=0.02)
    assert width["rows"] == pytest.approx(width["once"] / 2, rel=0.02)  # the control
    assert (grouped.clusters, grouped.n, grouped.test) == (200, 800, "sign-flip over clusters")
    assert (once.clusters, once.test) == (200, "mid-p McNemar")
    assert rows.p < grouped.p
    alone = proportion(first)
    assert near(alone, *proportion_confint(int(first.sum()), 200, 0.05, "wilson"))
    assert proportion(thrice[0], names).low < alone.low


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows cannot be paired with 2"):
        paired([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="1 clusters are named for 2 rows"):
        proportion([1, 0], ["a"])
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 2, 95)


def test_it_needs_no_torch() -> None:
    code = "import sys; import rl_lvr.evaluation.statistics; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_known_of_no_rows() -> None:
    assert proportion([]) == Interval(0, 1)
    assert paired([], []).interval == Interval(-1, 1)
    assert paired([], []).p == 1


@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say(clustered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short form of benchmarks/intervals.py, which makes 4,000 experiments."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    found = importlib.import_module("intervals").measure(250, 0.2, clustered, seed=1)
    for name in ("coverage_proportion", "coverage_paired"):
        assert 0.92 <= found[name] <= 0.985, found
    assert found["size_sign_flip"] <= 0.08
    if clustered:  # the control
        assert found["coverage_paired_rows"] < 0.9
        assert found["size_mid_p"] > 0.08
