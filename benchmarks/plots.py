"""Figures of the benchmarks, written as <out>.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def bars(
    values: Mapping[str, float],
    out: str | Path,
    title: str,
    *,
    spread: Mapping[str, float],
    label: str,
) -> None:
    """Draws one horizontal bar per value, the first on top, with its number.

    Args:
      values: Label -> length.
      out: Path without a suffix.
      title: Title of the figure.
      spread: Label -> half the length of its whiskers.
      label: Label of the axis.
    """
    figure = Figure(figsize=(7.0, 1.4 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    whiskers = [spread[name] for name in values]
    axes.barh(list(values), list(values.values()), xerr=whiskers, height=0.6, capsize=3)
    axes.invert_yaxis()
    for row, (name, value) in enumerate(values.items()):
        text, edge = f"{value:.4g} ± {spread[name]:.2g}", max(value, 0.0) + spread[name]
        axes.annotate(text, (edge, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(f"{out}.png", dpi=150)


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    out: str | Path,
    title: str,
    marks: Mapping[str, float],
) -> None:
    """Draws points in panels side by side that share their rows, one row per name: points of equal
    value do not overlap.

    Args:
      panels: panels[label of the axis][name] = (x,), or (x, low, high) with the ends of its
        interval. A name may be missing in a panel.
      out: Path without a suffix.
      title: Title of the figure.
      marks: Label of the axis -> where a line crosses all rows.
    """
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    size = (2.0 + 2.6 * len(panels), 1.6 + 0.3 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, points) in zip(columns, panels.items(), strict=True):
        for name, (x, *ends) in points.items():
            row = names.index(name)
            axes.plot(x, row, "o", color="C0", markersize=5)
            if ends:
                axes.hlines(row, *ends, color="C0")
        if label in marks:
            axes.axvline(marks[label], color="black", linewidth=0.8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0].set_yticks(range(len(names)), names)
    columns[0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(f"{out}.png", dpi=150)
