"""The result of `rl-lvr lab grpo` as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(summary: dict[str, Any]) -> str:
    """Held-out accuracy with own latents before and after, per policy and seed; the attention pair; the engines."""
    lines = [f"{'policy':<12}{'seed':>5}{'own before':>12}{'own after':>11}{'gain':>8}{'oracle after':>14}{'CPU s':>8}"]
    for policy, found in summary["policies"].items():
        for row in found["seeds"]:
            gain = row["own_after"] - row["own_before"]
            lines.append(
                f"{policy:<12}{row['seed']:>5}{row['own_before']:>12.3f}{row['own_after']:>11.3f}{gain:>+8.3f}"
                f"{row['oracle_after']:>14.3f}{row['seconds']:>8.0f}"
            )
    for row in pairs(summary):
        mass, other = row["attention_mass"], row["with_attention"]
        lines.append(
            f"attention on latents, {row['policy']}, seed {row['seed']}: {mass['without']:.3f} without that reward, "
            f"{mass['with']:.3f} with it (own {row['own_after']:.3f} and {other['own_after']:.3f})"
        )
    engines = summary["engines"]
    if engines["equal"] is None:
        lines.append("engines: vLLM is not installed, nothing compared")
    else:
        verdict = "the same rewards" if engines["equal"] else "DIFFERENT rewards"
        lines.append(f"engines: hf and vllm give {verdict} in the first step ({engines['n']} completions)")
    lines.append(f"accuracy on {summary['n']} held-out puzzles")
    return "\n".join(lines)


def pairs(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of runs that have a twin with the attention reward."""
    return [
        {"policy": policy, **row}
        for policy, found in summary["policies"].items()
        for row in found["seeds"]
        if row["attention_mass"]["with"] is not None and row["attention_mass"]["without"] is not None
    ]


def draw(summary: dict[str, Any], path: Path) -> None:
    """By policy, a line per seed: left the accuracy before and after, right the mass without and with that reward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = summary["policies"]
    places = {policy: x for x, policy in enumerate(policies)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    colours = ["#4c72b0", "#dd8452", "#55a868", "#8172b3"]

    def line(axis: Any, policy: str, before: float, after: float) -> None:
        x = places[policy]
        axis.plot((x - 0.2, x + 0.2), (before, after), color=colours[x % 4], marker="o", markersize=4)

    for policy, found in policies.items():
        for row in found["seeds"]:
            line(left, policy, row["own_before"], row["own_after"])
        left.annotate(f"{found['gain']:+.2f}", (places[policy], 1.0), ha="center", fontsize=9)
    left.set_ylim(0, 1.08)
    left.set_ylabel(f"accuracy, own latents, {summary['n']} held-out puzzles")
    left.set_title("Before and after GRPO, a line per seed", fontsize=11)
    masses = []
    for row in pairs(summary):
        mass = row["attention_mass"]
        line(right, row["policy"], mass["without"], mass["with"])
        masses += mass.values()
    right.set_ylim(0, 1.15 * max(0.01, *masses) if masses else 1)
    right.set_ylabel("attention of the answer on the latents")
    right.set_title("Without and with the attention reward" if masses else "No attention run", fontsize=11)
    for axis in (left, right):
        axis.set_xticks(range(len(policies)), list(policies))
        axis.set_xlim(-0.5, len(policies) - 0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
