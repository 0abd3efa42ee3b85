"""The demo's result as a table for the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl_lvr.evaluation import picture
from rl_lvr.evaluation.picture import Panel

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
    panels = [
        Panel(
            title,
            {condition: summary[name][condition] for condition in CONDITIONS},
            dots={c: [seed[name][c] or 0.0 for seed in summary["seeds"]] for c in CONDITIONS},
            chance=summary[name]["chance"],
        )
        for name, title in TITLES.items()
    ]
    picture.draw(panels, path, f"accuracy on {summary['diagnostic']['n']} held-out puzzles")
