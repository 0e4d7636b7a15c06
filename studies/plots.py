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
    tables: Mapping[str, Mapping[str, tuple[float, float, bool]]], out: Path, measure: str
) -> None:
    """Draws what deployments score for their bytes, a panel per table.

    Args:
      tables: Table -> deployment -> megabytes, score in percent, and whether a token runs more
        kernels than the base's (hollow marks).
      out: The PNG file.
      measure: Name of the score.
    """
    figure = Figure(figsize=(8.0, 4.5 * len(tables)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for axes, (title, points) in zip(panels, tables.items(), strict=True):
        for i, (label, (size, score, beside)) in enumerate(points.items()):
            mark = {"color": f"C{i % 10}", "marker": "os^D"[i // 10 % 4], "ls": ""}
            axes.plot(size, score, **mark, mfc="white" if beside else None, label=label)
        axes.set(title=title, ylabel=f"{measure}, %", xlabel="megabytes")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("hollow: runs more kernels per token than the base", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
