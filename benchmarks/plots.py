"""Figures of the benchmarks, written as <out>.png."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

import zflora_jax as zf


def bars(
    values: Mapping[str, float],
    out: str | Path,
    title: str,
    *,
    spread: Mapping[str, float] | None = None,
    label: str,
) -> None:
    """Draws a horizontal bar for each value as <out>.png, the first on top. spread: Half the length
    of each whisker; label: Text of the axis.
    """
    with zf.styled():
        figure = Figure(figsize=(7.0, 1.2 + 0.36 * len(values)), layout="constrained")
        axes = figure.subplots()
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        whiskers = None if spread is None else [spread[name] for name in values]
        style = {"color": [*map(zf.colour_of, values)], "height": 0.66, "capsize": 3}
        axes.barh(list(values), list(values.values()), xerr=whiskers, **style)
        axes.invert_yaxis()
        for row, (name, value) in enumerate(values.items()):
            end = max(value, 0.0) + (0.0 if spread is None else spread[name])
            near = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{value:.3g}", (end, row), **near)
        axes.margins(x=0.12)
        figure.supxlabel(label, x=0.01, ha="left", fontsize=9)
        axes.grid(visible=False, axis="y")
        figure.savefig(f"{out}.png", dpi=150)
