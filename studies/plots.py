"""The pictures of studies' pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

import zflora_jax as zf
from studies.statistics import Difference


@contextmanager
def drawn(out: Path, title: str, rows: int) -> Iterator[Figure]:
    """A figure with a title and a number of rows, which is written to a PNG file at the end."""
    with zf.styled():
        figure = Figure(figsize=(8.0, 1.2 + 0.36 * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        yield figure
        figure.savefig(png := io.BytesIO(), dpi=150)
    zf.atomic_write(out, png.getvalue())


def forest(rows: Mapping[str, Sequence[Difference]], out: Path, margins: Sequence[float]) -> None:
    """Draws differences to LoRA with their intervals, a row per table: scores and losses.

    Args:
      rows: Table -> differences in score (points), validation loss and test loss (percent).
      out: The PNG file.
      margins: How far below zero each table's score may lie.
    """
    blue = zf.colour_of("zflora-minimal")
    text = "Scores and LoRA's do not differ clearly; held-out losses are slightly higher"
    with drawn(out, text, len(rows)) as figure:
        scores, losses = figure.subplots(1, 2, sharey=True)
        marks = ((scores, 0.0, blue, ""), (losses, -0.15, blue, "validation"))
        for i, (axes, shift, face, label) in enumerate((*marks, (losses, 0.15, "white", "test"))):
            gaps = [of[i] for of in rows.values()]
            ends = [[g.mean - g.low for g in gaps], [g.high - g.mean for g in gaps]]
            places = [place + shift for place in range(len(gaps))]
            style = {"fmt": "o", "color": blue, "mfc": face, "capsize": 3, "ms": 5, "label": label}
            axes.errorbar([g.mean for g in gaps], places, xerr=ends, **style)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.grid(visible=False, axis="y")
        scores.barh(range(len(rows)), [-m for m in margins], 0.8, color="green", alpha=0.12)
        scores.set_yticks(range(len(rows)), list(rows))
        scores.set_ylim(len(rows) - 0.5, -0.5)
        scores.set_xlabel("score minus LoRA's, points of 100\n(right: better; shaded: the margin)")
        losses.set_xlabel("held-out loss minus LoRA's, %\n(right: worse)")
        losses.set_xlim(-15, 15)
        losses.legend(loc="upper right")


def scores_and_bytes(
    points: Mapping[str, tuple[float, float, float | None, bool]], out: Path, measure: str
) -> None:
    """Draws the scores of deployments, with their bytes at the right.

    Args:
      points: Deployment -> megabytes, score in percent, its standard deviation over seeds, whether
        a token runs more kernels than the base's.
      out: The PNG file.
      measure: Name of the score.
    """
    text = "On 4-bit blocks a merged and rounded LoRA loses what it learned; zFLoRA keeps it"
    with drawn(out, text, len(points)) as figure:
        axes = figure.subplots()
        for place, (label, (size, score, deviation, more)) in enumerate(points.items()):
            colour = zf.colour_of(label)
            style = {"color": colour, "mfc": "white" if more else colour, "ms": 7, "capsize": 3}
            axes.errorbar(score, place, xerr=deviation, fmt="o", **style)
            at = axes.get_yaxis_transform()
            axes.text(1.02, place, f"{size:.1f} MB", transform=at, va="center")
        axes.set_yticks(range(len(points)), list(points))
        axes.invert_yaxis()
        axes.set(xlim=(0, None), xlabel=f"{measure}, %; whiskers: standard deviation of seeds")
        axes.grid(visible=False, axis="y")
        figure.supxlabel("hollow: more kernels per token than the base", fontsize=9)
