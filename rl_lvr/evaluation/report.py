"""What the rows of an evaluation say: shares with their intervals, differences to own, samples. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rl_lvr.evaluation.rows import Row, by_condition
from rl_lvr.evaluation.statistics import maj_at_k, paired, pass_at_k, proportion
from rl_lvr.latents.interventions import Intervention

OWN = Intervention.OWN.value


def summarise(
    rows: Sequence[Row], undefined: Mapping[str, str] | None = None, order: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all figures of an evaluation.

    `conditions` holds a table by condition, `categories` such tables by category where rows have one.

    Args:
        rows: Of one evaluation.
        undefined: Conditions without answers, and why.
        order: Of the conditions; others follow as they come.
    """
    rank = {name: number for number, name in enumerate(order)}
    rows = sorted(rows, key=lambda row: rank.get(row.condition, len(rank)))
    categories = sorted({row.category for row in rows if row.category is not None})
    summary: dict[str, Any] = {
        "records": len({row.id for row in rows}),
        "samples": max(Counter((row.id, row.condition) for row in rows).values(), default=0),
        "clusters": len({row.cluster for row in rows}),
        "rules": dict(Counter(row.rule for row in rows if row.condition == rows[0].condition)),
        "conditions": _tables(rows, rows),
        "undefined": dict(undefined or {}),
    }
    if categories:
        named = {name: [row for row in rows if row.category == name] for name in categories}
        summary["categories"] = {name: _tables(mine, rows) for name, mine in named.items()}
    return summary


def _tables(rows: Sequence[Row], whole: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Tables by condition of some rows; donors may be any of the `whole`."""
    conditions = by_condition(rows)
    references = {row.id: row.answer for row in whole}
    return {name: _table(mine, conditions.get(_base(name), []), references) for name, mine in conditions.items()}


def _base(name: str) -> str:
    """The condition that `name` is compared with: own latents with the same START; those themselves with plain own."""
    intervention, slash, start = name.partition("/")
    if intervention == OWN:
        return OWN if slash else ""
    return f"{OWN}{slash}{start}"


def _table(rows: Sequence[Row], base: Sequence[Row], references: Mapping[str, str]) -> dict[str, Any]:
    own = {(row.id, row.seed): row for row in base}
    right = [row.right for row in rows]
    clusters = [row.cluster for row in rows]
    share = proportion(right, clusters)
    table: dict[str, Any] = {
        "n": len(rows),
        "accuracy": sum(right) / len(right),
        "interval": [share.low, share.high],
        "unreadable": sum(row.extracted is None for row in rows) / len(rows),
        "trigger_rate": sum(row.latents > 0 for row in rows) / len(rows) if _feeds(rows[0]) else None,
    }
    pairs = [(row, own[row.id, row.seed]) for row in rows if (row.id, row.seed) in own]
    if pairs:
        found = paired([a.right for a, _ in pairs], [b.right for _, b in pairs], [a.cluster for a, _ in pairs])
        table["minus_own"] = {**asdict(found), "interval": [found.interval.low, found.interval.high]}
    donors = [(row.answer, references.get(row.donor)) for row in rows if row.donor is not None]
    if donors:
        table["same_answer_donors"] = sum(one == other for one, other in donors) / len(donors)
    signals = _signals(rows)
    return table | _samples(rows) | ({"signals": signals} if signals else {})


def _feeds(row: Row) -> bool:
    """Whether the row's condition feeds vectors at all."""
    return Intervention(row.condition.partition("/")[0]).feeds_vectors


def _samples(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """pass@k, avg@k and maj@k over the samples of a question, where all questions have as many."""
    questions: dict[str, list[Row]] = {}
    for row in rows:
        questions.setdefault(row.id, []).append(row)
    counts = {len(mine) for mine in questions.values()}
    n = min(counts)
    if n < 2 or len(counts) > 1:
        return {}
    sizes = [*(1 << i for i in range(n.bit_length()) if 1 << i < n), n]
    right = [[row.right for row in mine] for mine in questions.values()]
    said = [[row.extracted for row in mine] for mine in questions.values()]
    return {
        "pass": {str(k): _mean(pass_at_k(sum(mine), n, k) for mine in right) for k in sizes},
        "avg": {str(n): _mean(sum(mine) / n for mine in right)},
        "maj": {str(n): _mean(maj_at_k(*pair) for pair in zip(said, right, strict=True))},
    }


def _signals(rows: Sequence[Row]) -> dict[str, float | None]:
    """Means over the completions that have a value; None if none has."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.signals.items():
            values.setdefault(name, [])
            if value is not None:
                values[name].append(value)
    return {name: _mean(found) if found else None for name, found in values.items()}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# ---- for people


def text_of(summary: Mapping[str, Any]) -> str:
    """The tables as plain text."""
    lines = _lines(summary["conditions"])
    for name, why in summary["undefined"].items():
        lines.append(f"{name}: {why}")
    for name, tables in summary.get("categories", {}).items():
        lines += ["", f"category {name}", *_lines(tables)]
    for name, table in summary["conditions"].items():
        values = [f"{key} {_figure(value, '.4f')}" for key, value in table.get("signals", {}).items()]
        if values:
            lines.append(f"{name}: {', '.join(values)}")
        share = table.get("same_answer_donors", 0)
        if share:
            lines.append(f"{name}: {share:.1%} of the donors have the same answer")
    samples = f", {summary['samples']} samples each" if summary["samples"] > 1 else ""
    clusters = f" in {summary['clusters']} clusters" if summary["clusters"] < summary["records"] else ""
    lines.append(f"{summary['records']} records{clusters}{samples}; 95 % intervals")
    return "\n".join(lines)


def _figure(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _lines(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    wide = max(len("condition"), *map(len, tables)) + 2
    sampled = next((list(table["pass"])[-1] for table in tables.values() if "pass" in table), None)
    head = f"{'condition':<{wide}}{'right':>6}  {'interval':<16}{'minus own':>9}  {'interval':<18}{'unreadable':>10}"
    head += f"{'trigger':>9}" + (f"{f'pass@{sampled}':>9}{f'maj@{sampled}':>9}" if sampled else "")
    lines = [head.rstrip()]
    for name, table in tables.items():
        low, high = table["interval"]
        line = f"{name:<{wide}}{table['accuracy']:>6.3f}  {f'{low:.3f} to {high:.3f}':<16}"
        pair = table.get("minus_own")
        if pair is None:
            line += f"{'':>9}  {'':<18}"
        else:
            low, high = pair["interval"]
            line += f"{pair['difference']:>+9.3f}  {f'{low:+.3f} to {high:+.3f}':<18}"
        line += f"{table['unreadable']:>10.3f}{_figure(table['trigger_rate'], '.3f'):>9}"
        if sampled and "pass" in table:
            line += f"{table['pass'][sampled]:>9.3f}{table['maj'][sampled]:>9.3f}"
        lines.append(line.rstrip())
    return lines
