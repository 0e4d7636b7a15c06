"""Figures, drawn without a display and without pyplot's global state, as <out>.png and <out>.svg.

matplotlib is imported when a figure is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path
from zflora_jax.reporting.files import atomic_write
from zflora_jax.reporting.metrics import read_metrics

# Panels of `training_curves`: the key of a record, its label, whether the axis is logarithmic.
PANELS = (
    ("loss", "loss (nats per token)", False),
    ("learning_rate", "learning rate", False),
    ("target_tokens_per_s", "speed (target tokens per second)", False),
    ("grad_norm", "gradient norm before clipping", True),
)


def training_curves(runs: Mapping[str, str | Path], out: str | Path, title: str) -> Any:
    """Draws `PANELS` over steps, of one run or of several: training as a line, other splits as
    points of the same colour. Returns the figure; ConfigError if there is nothing to draw.

    Args:
      runs: Label -> its metrics.jsonl.
      out: Path without a suffix.
      title: Title of the figure.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

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
    lines = figure.axes[0].lines
    figure.set_figheight(7.4 + 0.2 * -(-len(lines) // 2))
    style = {"frameon": False, "fontsize": 8}
    figure.legend(handles=lines, loc="outside lower center", ncols=2, **style)
    if not any(axes.lines for axes in figure.axes):
        raise ConfigError(f"{', '.join(map(str, runs.values()))}: no numbers to draw.")
    out = as_path(out, "figure")
    # Text stays text, and the same figure the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "zflora_jax"}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            atomic_write(f"{out}.{kind}", buffer.getvalue())
    return figure


def _by_split(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, dict[int, float]]]:
    """(split, step -> value) of one metric, train first."""
    splits: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(key) is not None:  # null: a value that was not finite
            splits.setdefault(row["split"], {})[row["step"]] = row[key]
    return sorted(splits.items(), key=lambda item: (item[0] != "train", item[0]))
