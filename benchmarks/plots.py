"""Figures of the benchmarks, written as <out>.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def bars(
    values: Mapping[str, float],
    out: str | Path,
    title: str,
    *,
    spread: Mapping[str, float] | None = None,
    label: str,
) -> None:
    """Draws one horizontal bar per value, the first on top, with its number.

    Args:
      values: Label -> length.
      out: Path without a suffix.
      title: Title of the figure.
      spread: Label -> half the length of its whiskers; None: there are none.
      label: Label of the axis.
    """
    figure = Figure(figsize=(7.0, 1.4 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    whiskers = None if spread is None else [spread[name] for name in values]
    axes.barh(list(values), list(values.values()), xerr=whiskers, height=0.6, capsize=3)
    axes.invert_yaxis()
    for row, (name, value) in enumerate(values.items()):
        more = 0.0 if spread is None else spread[name]
        text, edge = f"{value:.4g}" + (f" ± {more:.2g}" if more else ""), max(value, 0.0) + more
        axes.annotate(text, (edge, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(f"{out}.png", dpi=150)
