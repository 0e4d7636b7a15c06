"""Differences of methods as a reader sees them: tables, verdicts, what they mean, a forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.evaluation.paired import Difference, verdict
from zflora_jax.evaluation.statistics import SuiteScore
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.differences import (
    ALL,
    Differences,
    TaskGaps,
    contrast_name,
    headline,
    informative,
)
from zflora_jax.reporting.plots import forest
from zflora_jax.reporting.tables import markdown_table

ROWS_ALONE = (
    "°: these seeds vary no more than single answers do, so interval and p are those of the rows"
    " alone; few seeds can hide what others would change."
)


def difference_blocks(
    plan: Comparison,
    compared: Differences,
    scores: Mapping[str, SuiteScore],
) -> list[str]:
    """The table of differences to the reference and that of contrasts, and how they were taken."""
    gaps = compared.to_reference
    if not gaps:
        return []
    rows = [
        {"method": label}
        | {task: gap_text(gap) for task, gap in of.items()}
        | _certainty(headline(of), None if label == BASE else plan.compared_seed_count(label))
        | {"verdict": verdict_of(plan, label, headline(of))}
        | {"test loss": loss_text(plan, label, compared.losses.get(label))}
        for label, of in gaps.items()
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if plan.margin is None:
        columns.remove("verdict")
    weak = [t for t in plan.tasks if t not in informative(plan.tasks, gaps.get(BASE))]
    measure = next(iter(scores.values())).headline
    note = (
        f"{measure} less that of {plan.reference}, in points of 100, on the same rows and seeds,"
        " with 95% intervals over rows and seeds, of a single seed over rows alone"
        " (`zflora_jax.evaluation.paired`)."
        f" seeds: those that a method shares with {plan.reference}, over which its difference is"
        " taken; means below are over all seeds of a method, ± their standard deviation. p: of no"
        f" difference, not corrected for the number of methods. test loss: less {plan.reference}'s,"
        " nats per target token, with the 95% interval (Student's t) of the seeds on these rows,"
        f" not corrected either. {ROWS_ALONE}"
    )
    if plan.margin is not None:
        note += f" {verdict_legend(plan.reference, f'{plan.margin:g} points')}"
    if weak:
        note += (
            f" {plan.reference} does not clearly beat the untrained model on {', '.join(weak)}:"
            " they say nothing about methods, and are compared by none."
        )
    return [
        f"## Difference to {plan.reference}",
        markdown_table(rows, columns),
        note,
        *_contrast_blocks(plan, compared.contrasts),
    ]


def _contrast_blocks(plan: Comparison, contrasts: Mapping[str, TaskGaps]) -> list[str]:
    wanted = {contrast_name(*pair): plan.shared_seed_count(*pair) for pair in plan.contrasts}
    rows = [
        {"methods": name}
        | {task: gap_text(gap) for task, gap in of.items()}
        | _certainty(headline(of), wanted[name])
        for name, of in contrasts.items()
    ]
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        "## Differences between methods",
        markdown_table(rows, columns),
        "The first less the second, over the seeds that both have; else as above.",
    ]


def _certainty(gap: Difference, wanted: int | None) -> dict[str, Any]:
    """Over how many seeds a difference is, and its p once all that are `wanted` are there."""
    if wanted is None:
        return {"seeds": None, "p": None}
    whole = gap.seeds >= wanted
    return {
        "seeds": gap.seeds if whole else f"{gap.seeds} of {wanted}",
        "p": gap.p if whole else None,
    }


def gap_text(gap: Difference) -> str:
    """A difference with its interval, and whether seeds had a part in it (`ROWS_ALONE`)."""
    return f"{gap}{_mark(gap)}"


def _mark(gap: Difference) -> str:
    return " °" if gap.of_rows_alone else ""


def is_whole(plan: Comparison, label: str, gap: Difference) -> bool:
    """Whether a difference to the reference is over all seeds that it is to be over."""
    return gap.seeds >= plan.compared_seed_count(label)


def loss_text(plan: Comparison, label: str, gap: Difference | None) -> str | None:
    """A difference of losses to the reference with its interval, once all seeds are there."""
    if gap is None or not is_whole(plan, label, gap):
        return None
    return f"{gap.mean:+.3g} [{gap.low:+.3g}, {gap.high:+.3g}]"


def verdict_of(plan: Comparison, label: str, gap: Difference) -> str | None:
    """What a difference says by the margin, once all seeds are there; None of the base."""
    if plan.margin is None or label == BASE:
        return None
    if not is_whole(plan, label, gap):
        return f"{gap.seeds} of {plan.compared_seed_count(label)} seeds"
    return verdict(gap, plan.margin)


def draw_differences(
    compared: Sequence[tuple[Comparison, Mapping[str, TaskGaps]]], out: Path, title: str, label: str
) -> None:
    """A forest plot of differences to references, a panel for each comparison and, of one with
    several tasks, for each task. Those that a panel is judged by have the mark of `ROWS_ALONE`.

    Args:
      compared: comparisons with their differences; the untrained model's are not drawn.
      out: path without a suffix.
      title: of the picture.
      label: of the axis.
    """
    panels, margins = dict[str, dict[str, Sequence[float]]](), dict[str, float]()
    faint = set[tuple[str, str]]()

    def add(panel: str, name: str, gap: Difference, is_faint: bool) -> None:
        panels.setdefault(panel, {})[name] = (gap.mean, gap.low, gap.high)
        if is_faint:
            faint.add((panel, name))

    for plan, gaps in compared:
        drawn = {method: of for method, of in gaps.items() if method != BASE}
        several = max((len(of) for of in drawn.values()), default=0) > 1
        before = f"{plan.title}, " if len(compared) > 1 else ""
        first = f"{before}mean of tasks" if several else plan.title
        for method, of in drawn.items():
            gap = headline(of)
            is_faint = not is_whole(plan, method, gap)
            name = f"{method}{_mark(gap)}"
            said = verdict_of(plan, method, gap)
            add(first, f"{name}, {said}" if said else name, gap, is_faint)
            for task in [task for task in of if several and task != ALL]:
                add(f"{before}{task}", method, of[task], is_faint)
        if plan.margin and drawn:
            margins[first] = plan.margin
    grey = " (grey: not all seeds yet)" if faint else ""
    forest(panels, out, title, label + grey, margins, faint)


def verdict_legend(reference: str, margin: str) -> str:
    """What the verdicts mean, in words."""
    return (
        f"As good: the whole interval lies above a loss of {margin}, fixed before the runs."
        " Inferior: it lies below. Worse: it lies below 0 and reaches across that loss, so by how"
        " much is open. Undecided: it reaches across both, so these rows and seeds do not tell"
        f" whether the method is as good as {reference}."
    )
