"""Figures, drawn without a display and without pyplot's global state, as <out>.png and <out>.svg.

matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zflora_jax.core.storage import as_path
from zflora_jax.reporting.files import atomic_write
from zflora_jax.reporting.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


IN_PANEL = 4  # of so many runs the names stand in the first panel; of more, below the figure
# What `training_curves` draws: the key of a record, its unit, whether the axis is logarithmic.
PANELS = (
    ("loss", "loss (nats per token)", False),
    ("learning_rate", "learning rate", False),
    ("target_tokens_per_s", "speed (target tokens per second)", False),
    ("grad_norm", "gradient norm before clipping", True),
)


def training_curves(runs: Mapping[str, str | Path], out: str | Path, title: str) -> None:
    """Draw loss, learning rate, tokens/s and gradient norm over steps, of one run or of several.

    Training is a line; the loss of every other split is points of the same colour.

    Args:
      runs: label -> its metrics.jsonl.
      out: path without a suffix.
      title: of the figure.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Ten colours that are easy to tell apart; of more runs as many as there are, along a scale.
    colours: list[Any] = (
        [f"C{i}" for i in range(10)]
        if len(runs) <= 10
        else [colormaps["turbo"](i / (len(runs) - 1)) for i in range(len(runs))]
    )
    figure = Figure(figsize=(11.0, 7.4), layout="constrained")
    figure.suptitle(title)
    drawn = False
    records = {label: read_metrics(path) for label, path in runs.items()}
    for axes, (key, label, logarithmic) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for colour, (name, rows) in enumerate(records.items()):
            for split, values in _by_split(rows, key):
                steps, heights = zip(*sorted(values.items()), strict=True)
                style = (
                    {"linewidth": 1.3}
                    if split == "train"
                    else {"linestyle": ":", "marker": "o", "markersize": 5}
                )
                last = f" ({split}, last {heights[-1]:.4g})" if key == "loss" else ""
                axes.plot(steps, heights, color=colours[colour], label=f"{name}{last}", **style)  # type: ignore[arg-type]
                drawn = True
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if logarithmic and axes.lines:
            axes.set_yscale("log")
        if axes.lines and key == "loss" and len(records) <= IN_PANEL:
            # A long label may overlap the curves, not squeeze them.
            axes.legend(frameon=False, fontsize=8).set_in_layout(False)
    if len(records) > IN_PANEL:
        runs_of = [
            Line2D([], [], color=colour, label=name)
            for name, colour in zip(records, colours, strict=False)
        ]
        figure.set_figheight(7.4 + 0.2 * -(-len(records) // 2))
        figure.legend(
            handles=runs_of, loc="outside lower center", ncols=2, frameon=False, fontsize=7
        )
    if not drawn:
        raise ValueError(f"{', '.join(map(str, runs.values()))}: no numbers to draw.")
    _save(figure, out)


def _by_split(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[str, dict[int, float]]]:
    """(split, step -> value) of one metric, train first."""
    splits: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None:  # null: a number that was not finite
            splits.setdefault(row["split"], {})[row["step"]] = row[key]
    return sorted(splits.items(), key=lambda item: (item[0] != "train", item[0]))


def bars(
    values: Mapping[str, float],
    out: str | Path,
    title: str,
    *,
    spread: Mapping[str, float] | None = None,
    label: str = "",
) -> None:
    """Draw one horizontal bar per value, the first on top, with its number.

    Args:
      values: label -> length.
      out: path without a suffix.
      title: of the figure.
      spread: label -> half the length of its whiskers.
      label: of the axis.
    """
    if not values:
        raise ValueError(f"no values to draw for {title!r}.")
    spread = dict(spread or {})
    unknown = spread.keys() - values.keys()
    if unknown:
        raise ValueError(
            f"spread names {sorted(unknown)} have no value; values are given for {sorted(values)}."
        )
    figure, axes = _figure(title, height=1.4 + 0.4 * len(values))
    axes.barh(
        list(values),
        list(values.values()),
        xerr=[spread.get(name, 0.0) for name in values],
        height=0.6,
        capsize=3,
    )
    axes.invert_yaxis()
    for row, (name, value) in enumerate(values.items()):
        text = f"{value:.4g}" + (f" ± {spread[name]:.2g}" if name in spread else "")
        edge = max(value, 0.0) + spread.get(name, 0.0)
        axes.annotate(text, (edge, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, out)


def grouped_bars(
    values: Mapping[str, Mapping[str, float]],
    out: str | Path,
    title: str,
    label: str = "",
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> None:
    """Draw groups of vertical bars, one colour per series, with a number on each.

    Args:
      values: values[series][group].
      out: path without a suffix.
      title: of the figure.
      label: of the axis.
      intervals: intervals[series][group] = (low, high), drawn as whiskers.
    """
    groups = list(dict.fromkeys(group for series in values.values() for group in series))
    if not groups:
        raise ValueError(f"no values to draw for {title!r}.")
    figure, axes = _figure(title)
    figure.set_size_inches(max(7.0, 0.8 + 0.28 * len(groups) * (len(values) + 1)), 4.6)
    width = 1 / (len(values) + 1)
    for i, (series, heights) in enumerate(values.items()):
        places = [groups.index(group) + (i - (len(values) - 1) / 2) * width for group in heights]
        drawn = axes.bar(places, list(heights.values()), width, label=series)
        for place, (group, height) in zip(places, heights.items(), strict=True):
            if intervals is not None:
                low, high = intervals[series][group]
                axes.errorbar(
                    place,
                    height,
                    [[max(height - low, 0.0)], [max(high - height, 0.0)]],
                    color="black",
                    linewidth=0.6,
                    capsize=1,
                )
        axes.bar_label(drawn, fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(groups)), groups)
    if len(groups) * max(map(len, groups)) > 60:  # side by side they would run into each other
        axes.tick_params(axis="x", rotation=25)
    axes.set_ylabel(label)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, out)


def forest(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    out: str | Path,
    title: str,
    label: str,
    margins: Mapping[str, float] | None = None,
    faint: Collection[tuple[str, str]] = (),
) -> None:
    """Draw differences as points with their intervals, a panel per group and a row per label; zero
    is marked, and a margin below it is shaded.

    Args:
      groups: groups[group][label] = (mean, low, high).
      out: path without a suffix.
      title: of the figure.
      label: of the axes.
      margins: group -> how far below zero a difference may lie.
      faint: (group, label) of what is drawn in grey.
    """
    from matplotlib.figure import Figure

    if not any(groups.values()):
        raise ValueError(f"no values to draw for {title!r}.")
    heights = [max(len(rows), 1) for rows in groups.values()]
    figure = Figure(figsize=(7.0, 1.4 + 0.75 * len(groups) + 0.3 * sum(heights)))
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, (group, rows) in zip(panels[:, 0], groups.items(), strict=True):
        names = list(rows)
        for place, (mean, low, high) in enumerate(rows.values()):
            reach = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]  # rounding may pass it
            color = "0.6" if (group, names[place]) in faint else "C0"
            axes.errorbar(mean, place, xerr=reach, fmt="o", color=color, capsize=3, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        if margins and group in margins:
            axes.axvspan(-margins[group], 0, color="C2", alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if len(groups) > 1:
            axes.set_title(group, fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # In the middle of the figure: long names of rows leave the panels little width.
    figure.supxlabel(f"{label}\n(shaded: the margin)" if margins else label, fontsize=10)
    _save(figure, out)


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    out: str | Path,
    title: str,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Draw points in panels side by side that share their rows, one row for each name: points of
    equal value stay apart.

    Args:
      panels: panels[label of the axis][name] = (x,), or (x, low, high) with the ends of its
        interval. A name may be missing in a panel.
      out: path without a suffix.
      title: of the figure.
      marks: label of the axis -> where a line crosses all rows.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    if not names:
        raise ValueError(f"no values to draw for {title!r}.")
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
        if marks and label in marks:
            axes.axvline(marks[label], color="black", linewidth=0.8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    columns[0].set_yticks(range(len(names)), names)
    columns[0].set_ylim(len(names) - 0.5, -0.5)
    _save(figure, out)


def curves(
    series: Mapping[str, Mapping[float, float]], out: str | Path, title: str, *, x: str, y: str
) -> None:
    """Draw one line with markers per series.

    Args:
      series: series[name][x] = y.
      out: path without a suffix.
      title: of the figure.
      x: label of the axis.
      y: label of the axis.
    """
    if not any(series.values()):
        raise ValueError(f"no values to draw for {title!r}.")
    figure, axes = _figure(title)
    for name, points in series.items():
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            marker="o",
            markersize=4,
            linewidth=1.3,
            label=name,
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, out)


def _figure(title: str, height: float = 4.2) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, out: str | Path) -> None:
    import matplotlib

    out = as_path(out, "figure")
    # Text stays text, and the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zflora_jax"}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            # A Figure made without pyplot draws without a display.
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            atomic_write(f"{out}.{kind}", buffer.getvalue())
