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
    """Left: a line per seed from before to after, by policy. Right: the attention pair, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = summary["policies"]
    paired = pairs(summary)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), constrained_layout=True, width_ratios=[max(len(policies), 2), 2]
    )
    colours = ["#4c72b0", "#dd8452", "#55a868", "#8172b3"]
    for x, found in enumerate(policies.values()):
        for row in found["seeds"]:
            places, values = (x - 0.2, x + 0.2), (row["own_before"], row["own_after"])
            left.plot(places, values, color=colours[x % 4], marker="o", markersize=4)
        left.annotate(f"{found['gain']:+.2f}", (x, 1.0), ha="center", fontsize=9)
    left.set_xticks(range(len(policies)), list(policies))
    left.set_xlim(-0.5, len(policies) - 0.5)
    left.set_ylim(0, 1.08)
    left.set_ylabel(f"accuracy, own latents, {summary['n']} held-out puzzles")
    left.set_title("Before and after GRPO, a line per seed", fontsize=11)
    for row in paired:
        mass = row["attention_mass"]
        right.plot((0, 1), (mass["without"], mass["with"]), color=colours[2], marker="o", markersize=4)
    right.set_xticks((0, 1), ("accuracy alone", "and attention"))
    right.set_xlim(-0.4, 1.4)
    right.set_ylim(0, 1.15 * max([0.01, *(value for row in paired for value in row["attention_mass"].values())]))
    right.set_ylabel("attention of the answer on the latents")
    right.set_title(f"The attention reward ({paired[0]['policy']})" if paired else "No attention run", fontsize=11)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
