"""How often intervals hold the truth, and how often tests reject it, over simulated experiments of known truth.

    python benchmarks/intervals.py | python benchmarks/record.py intervals

Rows are pairs of answers to one question. Discordance is the share of pairs that differ; in clusters of four, rows are
alike with an intraclass correlation of 0.3 (Dirichlet-multinomial). The control of clustered rows treats them as
independent: its intervals are too short, and its test rejects too often.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import numpy as np

from rl_lvr.evaluation import statistics

ROWS, CLUSTER, ALIKE = 400, 4, 0.3
BOTH = 0.5
"""Share of pairs in which both are right."""


def experiments(
    count: int, shares: np.ndarray, clustered: bool, draws: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows right or wrong. `shares`: of both, only the first, only the second, neither."""
    groups = ROWS // CLUSTER
    for _ in range(count):
        if clustered:
            own = draws.dirichlet(shares * (1 / ALIKE - 1), groups).repeat(CLUSTER, 0)
        else:
            own = np.broadcast_to(shares, (ROWS, 4))
        kind = (draws.random((ROWS, 1)) > own.cumsum(1)[:, :3]).sum(1)
        yield kind <= 1, (kind == 0) | (kind == 2)


def measure(count: int, discordance: float, clustered: bool, seed: int) -> dict[str, float]:
    """Coverage of the intervals at a true difference of a fifth of the discordance, size of the tests at none."""
    draws = np.random.default_rng(seed)
    names = [row // CLUSTER for row in range(ROWS)] if clustered else None
    gain = discordance * 0.2
    alternative = np.array([BOTH, (discordance + gain) / 2, (discordance - gain) / 2, 1 - BOTH - discordance])
    held = {"proportion": 0, "paired": 0, "paired_rows": 0}
    for first, second in experiments(count, alternative, clustered, draws):
        held["proportion"] += statistics.proportion(first, names).holds(BOTH + alternative[1])
        held["paired"] += statistics.paired(first, second, names).interval.holds(gain)
        held["paired_rows"] += statistics.paired(first, second).interval.holds(gain)
    null = np.array([BOTH, discordance / 2, discordance / 2, 1 - BOTH - discordance])
    rejected = {"exact": 0, "mid_p": 0, "sign_flip": 0}
    for first, second in experiments(count, null, clustered, draws):
        gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
        sums = (first.astype(int) - second).reshape(-1, CLUSTER if clustered else 1).sum(1)
        rejected["exact"] += statistics.mcnemar_exact(gained, lost) <= 0.05
        rejected["mid_p"] += statistics.mcnemar_mid_p(gained, lost) <= 0.05
        rejected["sign_flip"] += statistics.sign_flip(sums) <= 0.05
    found = {f"coverage_{name}": hits / count for name, hits in held.items()}
    return found | {f"size_{name}": hits / count for name, hits in rejected.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for clustered in (False, True):
        for discordance in (0.2, 0.02):
            found = measure(options.experiments, discordance, clustered, options.seed)
            row = {"clustered": clustered, "discordance": discordance, **found}
            print(" ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            rows.append(row)
    print(json.dumps({"experiments": options.experiments, "rows": ROWS, "cluster": CLUSTER, "results": rows}))


if __name__ == "__main__":
    main()
