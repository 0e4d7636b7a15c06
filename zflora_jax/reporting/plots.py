"""Figures, drawn without a display and without pyplot's global state, as <out>.png and <out>.svg.

matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path
from zflora_jax.reporting.files import atomic_write
from zflora_jax.reporting.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_PANEL = 4  # with more runs their names stand below the figure
# Panels of `training_curves`: the key of a record, its label, whether the axis is logarithmic.
PANELS = (
    ("loss", "loss (nats per token)", False),
    ("learning_rate", "learning rate", False),
    ("target_tokens_per_s", "speed (target tokens per second)", False),
    ("grad_norm", "gradient norm before clipping", True),
)


def training_curves(runs: Mapping[str, str | Path], out: str | Path, title: str) -> None:
    """Draws `PANELS` over steps, of one run or of several: training as a line, other splits as
    points of the same colour. ConfigError if there is nothing to draw.

    Args:
      runs: Label -> its metrics.jsonl.
      out: Path without a suffix.
      title: Title of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Up to ten colours are easy to tell from each other.
    scale = colormaps["tab10" if len(runs) <= 10 else "turbo"]
    colours = [scale(i if len(runs) <= 10 else i / (len(runs) - 1)) for i in range(len(runs))]
    figure = Figure(figsize=(11.0, 7.4), layout="constrained")
    figure.suptitle(title)
    records = {label: read_metrics(path) for label, path in runs.items()}
    for axes, (key, label, logarithmic) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for colour, (name, rows) in zip(colours, records.items(), strict=True):
            for split, values in _by_split(rows, key):
                style: dict[str, Any] = {"linewidth": 1.3}
                if split != "train":
                    style = {"linestyle": ":", "marker": "o", "markersize": 5}
                steps, heights = zip(*sorted(values.items()), strict=True)
                last = f" ({split}, last {heights[-1]:.4g})" if key == "loss" else ""
                axes.plot(steps, heights, color=colour, label=f"{name}{last}", **style)
        axes.set(xlabel="step", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if logarithmic and axes.lines:
            axes.set_yscale("log")
        if axes.lines and key == "loss" and len(records) <= IN_PANEL:
            axes.legend(frameon=False, fontsize=8).set_in_layout(False)  # it may overlap the curves
    if len(records) > IN_PANEL:
        lines = [Line2D([], [], color=c, label=n) for n, c in zip(records, colours, strict=True)]
        figure.set_figheight(7.4 + 0.2 * -(-len(records) // 2))
        style = {"frameon": False, "fontsize": 7}
        figure.legend(handles=lines, loc="outside lower center", ncols=2, **style)
    if not any(axes.lines for axes in figure.axes):
        raise ConfigError(f"{', '.join(map(str, runs.values()))}: no numbers to draw.")
    _save(figure, out)


def _by_split(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, dict[int, float]]]:
    """(split, step -> value) of one metric, train first."""
    splits: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None:  # null: a value that was not finite
            splits.setdefault(row["split"], {})[row["step"]] = row[key]
    return sorted(splits.items(), key=lambda item: (item[0] != "train", item[0]))


def grouped_bars(
    values: Mapping[str, Mapping[str, float]], out: str | Path, title: str, label: str = ""
) -> None:
    """Draws groups of vertical bars, one colour per series, with a number on each.

    Args:
      values: Heights of the bars, values[series][group].
      out: Path without a suffix.
      title, label: Texts above the figure and at its axis.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(group for series in values.values() for group in series))
    width, wide = 1 / (len(values) + 1), max(7.0, 0.8 + 0.28 * len(groups) * (len(values) + 1))
    axes = (figure := Figure(figsize=(wide, 4.6), layout="constrained")).subplots()
    axes.set(title=title, ylabel=label, axisbelow=True)
    axes.spines[["top", "right"]].set_visible(False)
    for i, (series, heights) in enumerate(values.items()):
        places = [groups.index(group) + (i - (len(values) - 1) / 2) * width for group in heights]
        drawn = axes.bar(places, list(heights.values()), width, label=series)
        axes.bar_label(drawn, fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(groups)), groups)
    if sum(map(len, groups)) > 60:  # next to each other they would overlap
        axes.tick_params(axis="x", rotation=25)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    axes.grid(axis="y", alpha=0.3)
    _save(figure, out)


def _save(figure: Figure, out: str | Path) -> None:
    import matplotlib

    out = as_path(out, "figure")
    # Text stays text, and the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zflora_jax"}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            atomic_write(f"{out}.{kind}", buffer.getvalue())
