"""Forest plots of differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from studies.statistics import Difference


def forest(
    groups: Mapping[str, Mapping[str, Difference]], out: Path, margins: Mapping[str, float]
) -> None:
    """Draws differences as points with their intervals, a panel per group and a row per label. Zero
    is marked, and a margin below it is shaded.

    Args:
      groups: Group -> label -> difference in points.
      out: The PNG file.
      margins: Group -> how far below zero a difference may lie.
    """
    heights = [len(rows) for rows in groups.values()]
    figure = Figure(figsize=(7.0, 1.4 + 0.75 * len(groups) + 0.3 * sum(heights)))
    figure.set_layout_engine("constrained")
    figure.suptitle("Differences to LoRA, 95% intervals (right: better)")
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (group, rows) in zip(panels[:, 0], groups.items(), strict=True):
        for place, gap in enumerate(rows.values()):
            reach = [[max(gap.mean - gap.low, 0.0)], [max(gap.high - gap.mean, 0.0)]]
            axes.errorbar(gap.mean, place, xerr=reach, fmt="o", color="C0", capsize=3, ms=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvspan(-margins[group], 0, color="C2", alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(group, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("points of 100 of each study's measure\n(shaded: the margin)", fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
