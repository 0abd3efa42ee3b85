"""Accuracies as bars, a panel for each set of answers. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLOURS = {
    "oracle": "#4c72b0",
    "own": "#2f4b7c",
    "zeros": "#b0b0b0",
    "noise": "#dd8452",
    "swap": "#c44e52",
}
OTHER = "#8c8c8c"


@dataclass(frozen=True)
class Panel:
    """One set of answers."""

    title: str
    shares: Mapping[str, float | None]
    """By condition, from 0 to 1; None where there is no figure."""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By condition, [low, high]."""
    dots: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By condition, the figures that a share is the mean of."""
    chance: float | None = None


def panel_of(title: str, tables: Mapping[str, Mapping[str, Any]]) -> Panel:
    """A panel of `summarise(...)["conditions"]`."""
    shares = {name: table["accuracy"] for name, table in tables.items()}
    return Panel(title, shares, {name: table["interval"] for name, table in tables.items()})


def draw(panels: Sequence[Panel], path: Path, label: str) -> None:
    """Write the picture.

    Args:
        panels: From left to right.
        path: `.png`, or any other format of matplotlib.
        label: Of the axis of shares.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widest = max(len(panel.shares) for panel in panels)
    size = (max(5.0, 0.85 * widest) * len(panels), 4.0)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, constrained_layout=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw_panel(axis, panel)
    if panels[0].chance is not None:
        axes[0][0].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.9), fontsize=9)
    axes[0][0].set_ylabel(label)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel) -> None:
    names = list(panel.shares)
    values = [panel.shares[name] or 0.0 for name in names]
    colours = [COLOURS.get(name.partition("/")[0], OTHER) for name in names]
    bars = axis.bar(range(len(names)), values, color=colours, width=0.7)
    tops = [
        panel.intervals[name][1] if name in panel.intervals else value
        for name, value in zip(names, values, strict=True)
    ]
    for x, (name, value) in enumerate(zip(names, values, strict=True)):
        if name in panel.intervals:
            low, high = panel.intervals[name]
            axis.errorbar(
                x, value, [[max(value - low, 0)], [max(high - value, 0)]], color="black", capsize=3, linewidth=1
            )
        dots = panel.dots.get(name, ())
        if len(dots) > 1:
            axis.scatter([x] * len(dots), dots, color="black", s=10, zorder=3)
    shown = ["-" if panel.shares[name] is None else f"{panel.shares[name]:.2f}" for name in names]
    for bar, top, text in zip(bars, tops, shown, strict=True):
        axis.annotate(
            text, (bar.get_x() + bar.get_width() / 2, top), (0, 2), textcoords="offset points", ha="center", fontsize=9
        )
    if panel.chance is not None:
        axis.axhline(panel.chance, color="black", linestyle="--", linewidth=1, label="chance")
    crowded = len(names) > 6 or max(map(len, names)) > 9
    axis.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axis.set_title(panel.title, fontsize=11)
    axis.set_ylim(0, 1.12)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.spines[["top", "right"]].set_visible(False)
