"""The style of all figures, and the loss curves of runs. They need no display."""

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
COLOURS = {"base": "#7f7f7f", "LoRA merged": "#f5c396", "LoRA": "#e6812b", "zFLoRA": "#2767b1"}
_STYLE: Any = {
    **{"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9},
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def colour_of(label: str) -> str:
    """Returns the colour of a row or line in figures.

    Args:
      label: Its label, such as "LoRA, unmerged", which names the method.
    """
    words = label.lower().replace("unmerged", "").replace("zflora", "fused")
    name = "LoRA merged" if "merged" in words else "LoRA" if "lora" in words else "base"
    return COLOURS["zFLoRA" if "fused" in words or "ffba" in words else name]


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
      The matplotlib figure. ConfigError if no run has a loss.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    records, several = {label: read_metrics(x) for label, x in runs.items()}, len(runs) > 1
    if not any(_losses(rows, "train") for rows in records.values()):
        raise ConfigError(f"{', '.join(map(str, runs.values()))}: no losses to draw.")
    with styled():
        figure = Figure(figsize=(7.0, 4.0 + 0.2 * -(-len(runs) // 2)), layout="constrained")
        axes = figure.subplots()
        for i, (label, rows) in enumerate(records.items()):
            colour = colormaps["turbo"]((i + 0.5) / len(runs)) if several else COLOURS["zFLoRA"]
            train, held_out = (_losses(rows, split) for split in ("train", "eval"))
            axes.plot([*train], [*train.values()], color=colour, linewidth=1.4, label=label)
            axes.plot([*held_out], [*held_out.values()], "o", color=colour, markersize=6)
            for step in () if several else [*held_out][-1:]:
                text = f"   held-out {held_out[step]:.3g}"
                axes.annotate(text, (step, held_out[step]), va="center")
        if untrained is not None:
            axes.axhline(untrained, color=COLOURS["base"], linestyle="--")
            axes.annotate(f"untrained {untrained:.3g}", (1, untrained), va="bottom")
        axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title=title)
        if several:
            figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(buffer := io.BytesIO(), dpi=150)
    atomic_write(f"{as_path(out, 'figure')}.png", buffer.getvalue())
    return figure


def _losses(rows: Sequence[Mapping[str, Any]], split: str) -> dict[int, float]:
    """Step -> loss of a split, without null, which stands for a value that was not finite."""
    found = {r["step"]: r["loss"] for r in rows if r["split"] == split and r.get("loss")}
    return dict(sorted(found.items()))
