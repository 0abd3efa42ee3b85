"""The demo's result as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONDITIONS = ("oracle", "own", "zeros", "noise", "swap", "direct")
MEANING = {
    "oracle": "target latents fed",
    "own": "the model's own latents",
    "zeros": "zeros (off-distribution: not judged)",
    "noise": "noise of the same norm",
    "swap": "another puzzle's latents",
    "direct": "no latents (weak: before them)",
}
TITLES = {
    "diagnostic": "Diagnostic set: the latents carry the answer",
    "weak": "Weak set: the latents are idle",
}


def number(value: float | None) -> str:
    """Three digits, or a dash where there is no figure."""
    return "-" if value is None else f"{value:.3f}"


def table(summary: dict[str, Any]) -> str:
    """Accuracies of both sets side by side, plain text."""
    sets = ("diagnostic", "weak")
    lines = [f"{'latents':<42}{'diagnostic':>12}{'weak':>8}"]
    for name in CONDITIONS:
        cells = "".join(f"{number(summary[s][name]):>{w}}" for s, w in zip(sets, (12, 8), strict=True))
        lines.append(f"{name:<8}{MEANING[name]:<34}{cells}")
    chances = "".join(f"{number(summary[s]['chance']):>{w}}" for s, w in zip(sets, (12, 8), strict=True))
    lines.append(f"{'chance':<8}{'cannot follow the pointers':<34}{chances}")
    grpo = summary["grpo"]
    lines.append(
        f"GRPO ({grpo['policy']}) on a model that was trained too short: own "
        f"{number(grpo['own_before'])} before, {number(grpo['own_after'])} after"
    )
    seeds = len(summary["seeds"])
    lines.append(f"accuracy on {summary['diagnostic']['n']} held-out puzzles a set, {seeds} seed{'s' * (seeds > 1)}")
    return "\n".join(lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Bars of the mean accuracy, a dot per seed, chance as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, constrained_layout=True)
    colours = ["#4c72b0", "#2f4b7c", "#b0b0b0", "#dd8452", "#c44e52", "#8c8c8c"]
    for axis, name in zip(axes, TITLES, strict=True):
        values = [summary[name][c] or 0.0 for c in CONDITIONS]
        bars = axis.bar(CONDITIONS, values, color=colours, width=0.7)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=2, fontsize=9)
        for x, condition in enumerate(CONDITIONS):
            ys = [seed[name][condition] or 0.0 for seed in summary["seeds"]]
            if len(ys) > 1:
                axis.scatter([x] * len(ys), ys, color="black", s=10, zorder=3)
        axis.axhline(summary[name]["chance"], color="black", linestyle="--", linewidth=1, label="chance")
        axis.set_title(TITLES[name], fontsize=11)
        axis.set_ylim(0, 1.12)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.9), fontsize=9)
    axes[0].set_ylabel(f"accuracy on {summary['diagnostic']['n']} held-out puzzles")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
