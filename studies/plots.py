"""The pictures of studies' pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from studies.statistics import Difference


def forest(
    rows: Mapping[str, Sequence[Difference]], out: Path, margins: Sequence[float], reach: float = 15
) -> None:
    """Draws differences to LoRA with their intervals, a row per table: scores, with the margin
    below zero shaded, and next to them losses.

    Args:
      rows: Table -> differences in score (points), validation loss and test loss (percent).
      out: The PNG file.
      margins: How far below zero each table's score may lie.
      reach: Largest loss shown, in percent.
    """
    figure = Figure(figsize=(8.0, 1.4 + 0.4 * len(rows)))
    figure.set_layout_engine("constrained")
    figure.suptitle("Scores are not told apart from LoRA's; held-out losses are slightly higher")
    scores, losses = figure.subplots(1, 2, sharey=True)
    marks = ((scores, 0.0, "C0", ""), (losses, -0.15, "C0", "validation"))
    for i, (axes, shift, face, label) in enumerate((*marks, (losses, 0.15, "white", "test"))):
        gaps = [of[i] for of in rows.values()]
        ends = [[g.mean - g.low for g in gaps], [g.high - g.mean for g in gaps]]
        places = [place + shift for place in range(len(gaps))]
        style = {"fmt": "o", "color": "C0", "mfc": face, "capsize": 3, "ms": 5, "label": label}
        axes.errorbar([g.mean for g in gaps], places, xerr=ends, **style)
    scores.barh(range(len(rows)), [-m for m in margins], 0.8, color="C2", alpha=0.12)
    scores.set_yticks(range(len(rows)), list(rows))
    scores.set_ylim(len(rows) - 0.5, -0.5)
    scores.set_xlabel("score minus LoRA's, points of 100\n(right: better; shaded: the margin)")
    losses.set_xlabel("held-out loss minus LoRA's, %\n(right: worse)")
    losses.set_xlim(-reach, reach)
    losses.legend(frameon=False, fontsize=8)
    for axes in (scores, losses):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def scores_and_bytes(
    tables: Mapping[str, Mapping[str, tuple[float, float, float | None, bool]]],
    out: Path,
    measure: str,
) -> None:
    """Draws what deployments score, and writes their bytes beside it, a panel per table.

    Args:
      tables: Table -> deployment -> megabytes, score in percent, its standard deviation over seeds,
        whether a token runs more kernels than the base's.
      out: The PNG file.
      measure: Name of the score.
    """
    figure = Figure(figsize=(8.0, 1.2 + 0.3 * sum(map(len, tables.values()))), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (title, points) in zip(panels, tables.items(), strict=True):
        for place, (size, score, deviation, beside) in enumerate(points.values()):
            style = {"color": "C0", "mfc": "white" if beside else "C0", "ms": 6, "capsize": 3}
            axes.errorbar(score, place, xerr=deviation, fmt="o", **style)
            where = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
            axes.text(1.02, place, f"{size:.1f} MB", **where)
        axes.set_yticks(range(len(points)), list(points), fontsize=9)
        axes.invert_yaxis()
        axes.set(
            xlabel=f"{measure}, %, with the standard deviation of seeds ({title})", xlim=(0, None)
        )
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("hollow: runs more kernels per token than the base", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
