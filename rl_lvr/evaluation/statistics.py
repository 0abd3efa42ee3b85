"""Intervals and tests for answers to the same questions: the only statistics of the project. numpy and scipy alone.

Rows that belong together (one image, several samples of a question, options in another order) are a cluster, and count
as less than as many independent rows. Intervals then rest on the effective number of rows, n / deff, where deff is the
variance of the mean over clusters by that over rows (Kish; never below 1), and on Student's t with one degree of
freedom less than there are clusters. Tests then flip signs of whole clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
FLIPS = 20_000
"""Of a sign-flip test whose distribution is not enumerated."""
_MOST_CELLS = 10_000_000
"""Up to which it is."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Paired:
    """One condition against another on the same rows."""

    n: int
    clusters: int
    difference: float
    """Mean of the first minus mean of the second."""
    interval: Interval
    only_first: int
    """Rows that the first alone has right."""
    only_second: int
    p: float
    """Two-sided: mid-p McNemar over rows; over clusters a sign-flip test."""
    test: str


# ---- intervals


def wilson(right: float, n: float, level: float = 0.95, freedom: float = math.inf) -> Interval:
    """Wilson's score interval of a proportion (1927, eq. for the two roots). `right` and `n` need not be whole.

    Args:
        freedom: Degrees of freedom of Student's t; infinity is the normal distribution.
    """
    if n <= 0:
        return Interval(0.0, 1.0)
    z2 = _quantile(level, freedom) ** 2
    share = right / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(0.0 if right <= 0 else max(0.0, middle - half), 1.0 if right >= n else min(1.0, middle + half))


def proportion(right: ArrayLike, clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> Interval:
    """The interval of a share of rows, each of which is right or not."""
    rows = np.asarray(right, dtype=float)
    groups = _groups(len(rows), clusters)
    effective, freedom = _effective(rows, groups)
    return wilson(float(rows.mean()) * effective if len(rows) else 0.0, effective, level, freedom)


def tango(only_first: float, only_second: float, n: float, level: float = 0.95, freedom: float = math.inf) -> Interval:
    """Tango's score interval of a difference of paired proportions (Statistics in Medicine 17, 1998, eq. 7 to 9).

    It is the set of differences d that the score test does not reject, with the nuisance parameter at its maximum
    likelihood under d. Counts need not be whole.
    """
    if n <= 0:
        return Interval(-1.0, 1.0)
    z = _quantile(level, freedom)

    def score(d: float) -> float:
        a, c = 2 * n, -only_second * d * (1 - d)
        b = -only_first - only_second + (2 * n - only_first + only_second) * d
        nuisance = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * nuisance + d * (1 - d))
        distance = only_first - only_second - n * d
        if variance <= 0:
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    estimate = (only_first - only_second) / n
    return Interval(_root(score, z, -1.0, estimate), _root(score, -z, estimate, 1.0))


def _root(score: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where the falling function `score` passes `wanted`, between two places."""
    for _ in range(60):
        middle = (low + high) / 2
        if score(middle) > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def paired(
    first: ArrayLike, second: ArrayLike, clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> Paired:
    """Hold two conditions against each other, row by row right or wrong."""
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one.shape != other.shape:
        raise ValueError(f"{len(one)} rows cannot be paired with {len(other)}.")
    difference = one.astype(float) - other.astype(float)
    groups = _groups(len(one), clusters)
    n, count = len(one), int(groups.max()) + 1 if len(one) else 0
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    effective, freedom = _effective(difference, groups)
    share = effective / n if n else 0.0
    grouped = count < n
    return Paired(
        n=n,
        clusters=count,
        difference=float(difference.mean()) if n else math.nan,
        interval=tango(gained * share, lost * share, effective, level, freedom),
        only_first=gained,
        only_second=lost,
        p=sign_flip(np.bincount(groups, difference)) if grouped else mcnemar_mid_p(gained, lost),
        test="sign-flip over clusters" if grouped else "mid-p McNemar",
    )


# ---- tests, two-sided


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """McNemar's exact test: the discordant rows are coin flips."""
    n = only_first + only_second
    return 1.0 if n == 0 else float(stats.binomtest(only_first, n, 0.5).pvalue)


def mcnemar_mid_p(only_first: int, only_second: int) -> float:
    """McNemar's mid-p test (Fagerland et al. 2013): the exact one less half of what is observed."""
    n, least = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    here = float(stats.binom.pmf(least, n, 0.5))
    return 1 - here / 2 if only_first == only_second else 2 * float(stats.binom.cdf(least, n, 0.5)) - here


def sign_flip(sums: ArrayLike, seed: int = 0) -> float:
    """The sign-flip test of one sum per cluster: how often |sum of +-s| reaches |sum of s|, both signs being as likely.

    Whole numbers are enumerated (the distribution of their sum, cluster by cluster); others are drawn `FLIPS`
    times, the observed one counted among them.
    """
    given = np.asarray(sums, dtype=float)
    observed, values = abs(float(given.sum())), np.abs(given[given != 0])
    if not len(values):
        return 1.0
    total = int(values.sum()) if np.all(values == np.round(values)) else None
    if total is not None and total * len(values) <= _MOST_CELLS:
        chance = np.zeros(2 * total + 1)
        chance[total] = 1.0
        for value in values.astype(int):
            chance = (np.roll(chance, value) + np.roll(chance, -value)) / 2  # never passes an end
        reached = np.abs(np.arange(-total, total + 1)) >= observed - 0.5
        return min(1.0, float(chance[reached].sum()))
    draws = np.random.default_rng(seed)
    reached_count = 1
    for _ in range(FLIPS):
        signs = draws.integers(0, 2, len(values)) * 2 - 1
        reached_count += abs(float(signs @ values)) >= observed * (1 - 1e-12)
    return reached_count / (FLIPS + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values in the order given."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


# ---- several samples of a question


def pass_at_k(right: int, n: int, k: int) -> float:
    """The chance that one of `k` of `n` samples is right, without bias (Chen et al. 2021, eq. 1)."""
    if not 0 < k <= n:
        raise ValueError(f"k is {k}; it must be between 1 and the {n} samples.")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer of the samples is right; where answers tie, the share of them that is.

    Right answers count as one answer, however they are written. A sample without a readable answer (None) has no vote.
    """
    votes: dict[str | bool, int] = {}
    for answer, good in zip(answers, right, strict=True):
        if answer is not None:
            key = True if good else " ".join(answer.split()).casefold()
            votes[key] = votes.get(key, 0) + 1
    first = [key for key, count in votes.items() if count == max(votes.values())]
    return sum(key is True for key in first) / len(first) if first else 0.0


# ---- clusters


def _groups(n: int, clusters: Sequence[Hashable] | None) -> NDArray[np.int64]:
    """[n], the number of each row's cluster."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters are named for {n} rows.")
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(cluster, len(known)) for cluster in clusters], dtype=np.int64)


def _effective(values: Floats, groups: NDArray[np.int64]) -> tuple[float, float]:
    """The effective number of rows, and degrees of freedom."""
    n = len(values)
    sizes = np.bincount(groups) if n else np.zeros(0)
    if len(sizes) == n:
        return float(n), math.inf
    apart = values - values.mean()
    within = float((apart**2).sum()) / (n * (n - 1))
    if within == 0:  # nothing says how much alike the rows of a cluster are: as much as can be
        return n * n / float((sizes**2).sum()), max(1.0, len(sizes) - 1.0)
    between = float((np.bincount(groups, apart) ** 2).sum()) / n**2
    between *= len(sizes) / max(1, len(sizes) - 1)
    return n / max(1.0, between / within), max(1.0, len(sizes) - 1.0)


def _quantile(level: float, freedom: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1.")
    tail = (1 + level) / 2
    return float(stats.norm.ppf(tail) if math.isinf(freedom) else stats.t.ppf(tail, freedom))
