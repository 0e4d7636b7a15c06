"""One page over several comparisons: what was trained, every difference to the reference beside the
others, and what each comparison was seen to show.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.stored_config import from_file
from zflora_jax.evaluation.paired import Difference, holm
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.difference_view import (
    ROWS_ALONE,
    draw_differences,
    gap_text,
    is_whole,
    loss_text,
    verdict_legend,
    verdict_of,
)
from zflora_jax.experiments.differences import ALL, Differences, headline, informative
from zflora_jax.reporting.files import atomic_write
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.identity import same_numbers

SCORES_LEGEND = (
    "Score: the comparison's measure, the mean over its tasks and a method's seeds, ± the standard"
    " deviation of seeds. Test loss: likewise the mean of seeds, nats per target token, on held-out"
    " rows of the training task. Seconds: of the fastest run's training, on whatever CPU"
    " and beside whatever else it ran: they compare no methods."
)
LOSSES_LEGEND = (
    " Differences are over the seeds that a method shares with the reference, so they need not be"
    " those of the means here. Beside the test loss: that less the reference's, with the 95%"
    " interval (Student's t) of the seeds on these rows, not corrected for the number of"
    " comparisons."
)
LESS = "test loss less the reference's"
# Label of a method -> its headline difference.
Gaps = Mapping[str, Difference]


def page_name(plans: Sequence[Comparison], others: Sequence[str] = ()) -> str:
    """The file name of the page over these comparisons, and beside pages of the names `others`.

    Raises:
      ConfigError: a comparison's own page would have that name, or two would have one title on it.
    """
    stem = plans[0].name.partition("_")[0]
    require(
        stem not in (*(plan.name for plan in plans), *others),
        f"sweep {stem!r}: its page would be the overview's, {stem}.md; give it a name of two"
        f" words, such as {stem}_first.",
    )
    titles = [plan.title for plan in plans]
    alike = [plan.name for plan in plans if titles.count(plan.title) > 1]
    require(
        not alike,
        f"sweeps {', '.join(alike)}: the page over them shows names without the first word and"
        " categories, and these are the same; change one of them.",
    )
    return f"{stem}.md"


def overview(plans: Sequence[Comparison], out: str | Path) -> Path | None:
    """Write one page over the pages of several comparisons: <out>/<the first word of their
    names>.md, and where they have a reference a forest plot, .png and .svg.

    Args:
      plans: the comparisons; of those without a page it is said that they are not run yet.
      out: where the pages and their JSON are.

    Returns:
      Its path; None if no page is there yet.

    Raises:
      ConfigError: as for `page_name`.
    """
    path = Path(out) / page_name(plans)
    there = [plan for plan in plans if (Path(out) / f"{plan.name}.md").is_file()]
    if not there:
        return None
    found = {plan.name: _read(Path(out) / f"{plan.name}.json") for plan in there}
    compared = {plan.name: Differences.read(found[plan.name]) for plan in there}
    gaps = [
        (plan, {label: headline(of) for label, of in compared[plan.name].to_reference.items()})
        for plan in there
    ]
    gaps = [(plan, of) for plan, of in gaps if of.keys() - {BASE}]
    lines = [f"# {path.stem.capitalize()}", ""]
    whole = [plan for plan in there if _is_whole(plan, found[plan.name])]
    if len(whole) == len(plans):
        for about in dict.fromkeys(plan.about for plan in plans if plan.about):
            lines += [about, ""]
    if readings := [f"- {_link(plan)}: {_first(plan.reading)}" for plan in whole if plan.reading]:
        lines += [*readings, ""]
    if gaps:
        lines += _differences(plans, gaps, f"![Differences]({path.stem}.png)")
        lines += [*_weak_tasks(there, compared), ""]
        _draw(gaps, path)
    rows = [_row(plan, found.get(plan.name)) for plan in plans]
    lines += ["## Comparisons", "", markdown_table(rows, list(rows[0])), ""]
    scored = [
        row for plan in there for row in _scores(plan, found[plan.name], compared[plan.name].losses)
    ]
    if scored:
        columns = list(dict.fromkeys(key for row in scored for key in row))
        legend = SCORES_LEGEND + (LOSSES_LEGEND if LESS in columns else "")
        lines += ["## Scores", "", markdown_table(scored, columns), "", legend]
    atomic_write(path, ("\n".join(lines).rstrip() + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _first(reading: str) -> str:
    return reading.partition("\n\n")[0]


def _weak_tasks(plans: Sequence[Comparison], compared: Mapping[str, Differences]) -> list[str]:
    """The tasks that rank nothing, of the comparisons that know the untrained model's scores."""
    gaps = {plan.title: compared[plan.name].to_reference.get(BASE) for plan in plans}
    known = {title: of for title, of in gaps.items() if of}
    weak = [
        f"{task} of {title}"
        for title, of in known.items()
        for task in set(of) - {ALL, *informative(list(of), of)}
    ]
    text = (
        "Uninformative tasks, on which the reference does not clearly beat the untrained model, so"
        f" that they rank nothing: {', '.join(sorted(weak)) or 'none'}."
    )
    return [text] if known else []


def _trained(found: Mapping[str, Any]) -> list[str]:
    """The methods of a page."""
    return [row["method"] for row in found.get("rows", ()) if row["method"] != BASE]


def _missing(plan: Comparison, found: Mapping[str, Any]) -> list[str]:
    """The runs that a page lacks, and of one that was made of some methods alone the others."""
    missing = list(found.get("missing", ()))
    return missing + [m for m in plan.methods if m not in (*_trained(found), *missing)]


def _is_whole(plan: Comparison, found: Mapping[str, Any]) -> bool:
    """Whether a page is of all the runs of a plan: what was read in its tables is of these."""
    return not _missing(plan, found) and same_numbers(plan.base, _base_of(plan, found))


def _base_of(plan: Comparison, found: Mapping[str, Any]) -> RunConfig:
    """The plan's own base, unless settings were changed for its runs."""
    return from_file(RunConfig, found["config"]) if "config" in found else plan.base


def _row(plan: Comparison, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is compared, and what is missing; result: the comparison's JSON, None without a page."""
    found = result or {}
    missing = _missing(plan, found)
    base = _base_of(plan, found)
    return {
        "comparison": plan.title if result is None else _link(plan),
        "trained on": base.data.task,
        "steps": base.train.steps,
        "tokens": _tokens(base),
        "seeds": _seeds(plan),
        "methods": len(_trained(found)) or len(plan.methods),
        "tasks scored": ", ".join(plan.tasks) or None,
        "measure": plan.measure or None,
        "margin": plan.margin,
        "not run yet": "all" if result is None else ", ".join(missing) or None,
    }


def _tokens(run: RunConfig) -> int | None:
    """The tokens that a run trains on, prompts too: of packed rows, which are nearly full."""
    data = run.data
    step = data.bucket_lengths[-1] * data.batch_size
    return step * run.train.steps if data.packing else None


def _seeds(plan: Comparison) -> str:
    """How many seeds every method has, and which have others."""
    counts = {label: len(plan.seeds_of(label)) for label in plan.methods}
    usual = len(plan.seeds) if len(plan.seeds) in counts.values() else min(counts.values())
    others = [f"{label} {count}" for label, count in counts.items() if count != usual]
    return f"{usual} ({', '.join(others)})" if others else str(usual)


def _scores(
    plan: Comparison, found: Mapping[str, Any], losses: Mapping[str, Difference]
) -> list[dict[str, Any]]:
    """A row for the untrained model and for every method; losses: differences to the reference."""
    return [
        {
            "table": plan.title,
            "method": row["method"],
            "parameters": row["trainable"],
            "learning rate": _rate(row),
            "score": f"{row['mean']:.1f}"
            + (f" ± {row['std']:.1f}" if row.get("std") is not None else ""),
            "test loss": found["base"]["test"] if row["method"] == BASE else _test_loss(row),
            **({LESS: loss_text(plan, row["method"], losses.get(row["method"]))} if losses else {}),
            "seconds": row.get("seconds, fastest run"),
        }
        for row in found.get("rows", ())
        if row["scores"]
    ]


def _rate(row: Mapping[str, Any]) -> str | None:
    """The chosen rate; of one that is not tuned that it is the lowest, highest or only one."""
    if row.get("learning rate") is None:
        return None
    remark = (row.get("untuned") or "").partition(", so")[0]
    return f"{row['learning rate']:g}{', ' if remark else ''}{remark}"


def _test_loss(row: Mapping[str, Any]) -> float | None:
    """The mean over the seeds."""
    losses = [
        loss for key, loss in row.items() if key.startswith("test, seed") and loss is not None
    ]
    return statistics.mean(losses) if losses else None


def _draw(gaps: Sequence[tuple[Comparison, Gaps]], path: Path) -> None:
    """The forest plot of all differences but the untrained model's."""
    references = ", ".join(dict.fromkeys(plan.reference for plan, _ in gaps))
    draw_differences(
        [(plan, {label: {ALL: gap} for label, gap in of.items()}) for plan, of in gaps],
        path.with_suffix(""),
        f"Differences to {references}, 95% intervals (right: better)",
        "points of 100 of each table's measure",
    )


def _differences(
    plans: Sequence[Comparison], gaps: Sequence[tuple[Comparison, Gaps]], picture: str
) -> list[str]:
    """The table of all differences, their legend and picture."""
    known = {plan.name: of for plan, of in gaps}
    p = {}  # of what is not complete yet 1, so that no star goes when it comes
    for plan in plans:
        for label in [label for label in plan.methods if plan.reference not in ("", label)]:
            gap = known.get(plan.name, {}).get(label)
            whole = gap is not None and is_whole(plan, label, gap)
            p[f"{plan.name} {label}"] = gap.p if gap is not None and whole else 1.0
    p = holm(p)
    labels = list(dict.fromkeys(label for _, of in gaps for label in of))
    rows = [
        {"method": label}
        | {
            plan.title: _cell(plan, label, of[label], p.get(f"{plan.name} {label}"))
            for plan, of in gaps
            if label in of
        }
        for label in labels
    ]
    references = ", ".join(dict.fromkeys(plan.reference for plan, _ in gaps))
    legend = (
        f"Scores less those of {references}, in points of 100, on the same rows and seeds, with 95%"
        " intervals over rows and seeds, of a single seed over rows alone. base: the untrained"
        ' model. "*": a difference at the 5% level after Holm\'s correction over all comparisons'
        f" that are planned ({len(p)}). {ROWS_ALONE}"
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        "## Differences",
        "",
        markdown_table(rows, columns),
        "",
        f"{legend} {verdict_legend('the reference', 'the margin that the table below gives')}",
        "",
        picture,
        "",
    ]


def _link(plan: Comparison) -> str:
    return f"[{plan.title}]({plan.name}.md)"


def _cell(plan: Comparison, label: str, gap: Difference, p: float | None) -> str:
    verdict = verdict_of(plan, label, gap)
    star = " *" if p is not None and p < 0.05 else ""
    return f"{gap_text(gap)}{star}{f', {verdict}' if verdict else ''}"
