"""The style of all figures, and the loss curves of runs. Figures need no display.

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

# Method of a mark -> its colour, in the order of every figure.
COLOURS = {"base": "#7f7f7f", "LoRA": "#e6812b", "LoRA merged": "#f5c396", "zFLoRA": "#2767b1"}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def styled() -> Any:
    """Returns a context manager that draws figures in the project's style."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def loss_curves(
    runs: Mapping[str, str | Path], out: str | Path, title: str, untrained: float | None = None
) -> Any:
    """Draws the loss of runs over their steps as <out>.png: training as lines, held-out as points.

    Args:
      runs: Label -> its metrics.jsonl.
      out: Path without a suffix.
      title: Title of the figure.
      untrained: Held-out loss before training, drawn as a line; None: not drawn.

    Returns:
      The matplotlib figure.

    Raises:
      ConfigError: No run has a loss.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records = {label: read_metrics(path) for label, path in runs.items()}
    if not any(_losses(rows, "train") for rows in records.values()):
        raise ConfigError(f"{', '.join(map(str, runs.values()))}: no losses to draw.")
    shades = colormaps["turbo"]
    with styled():
        figure = Figure(figsize=(7.0, 4.0 + 0.2 * -(-len(runs) // 2)), layout="constrained")
        axes = figure.subplots()
        for i, (label, rows) in enumerate(records.items()):
            colour = COLOURS["zFLoRA"] if len(runs) == 1 else shades((i + 0.5) / len(runs))
            train, held_out = _losses(rows, "train"), _losses(rows, "eval")
            axes.plot([*train], [*train.values()], color=colour, linewidth=1.4, label=label)
            axes.plot([*held_out], [*held_out.values()], "o", color=colour, markersize=6)
            for step in [*held_out][-1:] if len(runs) == 1 else ():
                text = f"held-out {held_out[step]:.3g} "
                axes.annotate(text, (step, held_out[step]), ha="right", va="bottom")
        if untrained is not None:
            axes.axhline(untrained, color=COLOURS["base"], linestyle="--")
            axes.annotate(f"untrained {untrained:.3g}", (1, untrained), va="bottom")
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title=title)
        if len(runs) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(buffer := io.BytesIO(), dpi=150)
    atomic_write(f"{as_path(out, 'figure')}.png", buffer.getvalue())
    return figure


def _losses(rows: Sequence[Mapping[str, Any]], split: str) -> dict[int, float]:
    """Step -> loss of a split, without null, which stands for a value that was not finite."""
    found = {r["step"]: r["loss"] for r in rows if r["split"] == split and r.get("loss")}
    return dict(sorted(found.items()))
