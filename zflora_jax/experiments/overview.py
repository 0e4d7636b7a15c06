"""One page over several comparisons: what was trained, every difference to the reference beside the
others, and what each comparison was seen to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import require
from zflora_jax.evaluation.paired import Difference, holm
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.differences import headline
from zflora_jax.experiments.page import verdict_legend, verdict_of
from zflora_jax.reporting.files import atomic_write
from zflora_jax.reporting.plots import forest
from zflora_jax.reporting.tables import markdown_table

# Label of a method -> its headline difference.
Gaps = Mapping[str, Difference]


def overview(plans: Sequence[Comparison], out: str | Path) -> Path | None:
    """Write one page over the pages of several comparisons: <out>/<the first word of their
    names>.md, and where they have a reference a forest plot, .png and .svg.

    Args:
      plans: the comparisons; those without a page are left out.
      out: where the pages and their JSON are.

    Returns:
      Its path; None if no page is there yet.

    Raises:
      ConfigError: a comparison's own page would have that name.
    """
    path = Path(out) / f"{plans[0].name.partition('_')[0]}.md"
    taken = [plan.name for plan in plans if f"{plan.name}.md" == path.name]
    require(
        not taken,
        f"comparison {path.stem!r}: its page would be the overview's, {path.name}; give it a name"
        f" of two words, such as {path.stem}_first.",
    )
    there = [plan for plan in plans if (Path(out) / f"{plan.name}.md").is_file()]
    if not there:
        return None
    found = {plan.name: _read(Path(out) / f"{plan.name}.json") for plan in there}
    gaps = [(plan, of) for plan in there if (of := _gaps(found[plan.name]))]
    lines = [f"# {path.stem.capitalize()}", "", *_differences(gaps, path)]
    rows = [_row(plan, found[plan.name]) for plan in there]
    lines += ["## Comparisons", "", markdown_table(rows, list(rows[0])), ""]
    lines += [f"- {plan.name}: {plan.reading}" for plan in there if plan.reading]
    atomic_write(path, ("\n".join(lines).rstrip() + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _gaps(found: Mapping[str, Any]) -> Gaps:
    return {
        label: headline({task: Difference(**gap) for task, gap in of.items()})
        for label, of in found.get("differences", {}).items()
    }


def _row(plan: Comparison, found: Mapping[str, Any]) -> dict[str, Any]:
    there = [row["method"] for row in found.get("rows", ()) if row["method"] != BASE]
    return {
        "comparison": f"[{plan.name}]({plan.name}.md)",
        "trained on": plan.base.data.task,
        "steps": plan.base.train.steps,
        "seeds": _seeds(plan),
        "methods": len(there) or len(plan.methods),
        "tasks scored": ", ".join(plan.tasks) or None,
        "measure": found.get("compared by", {}).get("measure") or None,
        "margin": found.get("compared by", {}).get("margin"),
        "not run yet": ", ".join(found.get("missing", ())) or None,
    }


def _seeds(plan: Comparison) -> str:
    """How many seeds every method has, and which have more."""
    more = [f"{label} {len(plan.seeds_of(label))}" for label in plan.more_seeds]
    return f"{len(plan.seeds)} ({', '.join(more)})" if more else str(len(plan.seeds))


def _differences(gaps: Sequence[tuple[Comparison, Gaps]], path: Path) -> list[str]:
    """The table of all differences, their legend and picture."""
    gaps = [(plan, of) for plan, of in gaps if of.keys() - {BASE}]
    if not gaps:
        return []
    p = holm(
        {
            f"{plan.name} {label}": gap.p
            for plan, of in gaps
            for label, gap in of.items()
            if label != BASE and gap.seeds == plan.compared_seed_count(label)
        }
    )
    labels = list(dict.fromkeys(label for _, of in gaps for label in of))
    rows = [
        {"method": label}
        | {
            _title(plan): _cell(plan, label, of[label], p.get(f"{plan.name} {label}"))
            for plan, of in gaps
            if label in of
        }
        for label in labels
    ]
    drawn = {
        _title(plan): {k: (gap.mean, gap.low, gap.high) for k, gap in of.items() if k != BASE}
        for plan, of in gaps
    }
    forest(
        drawn,
        path.with_suffix(""),
        "Differences to the reference",
        "points of 100",
        {_title(plan): plan.margin for plan, _ in gaps if plan.margin},
    )
    references = ", ".join(dict.fromkeys(plan.reference for plan, _ in gaps))
    legend = (
        f"Scores less those of {references}, in points of 100, on the same rows and seeds, with 95%"
        ' intervals over both. base: the untrained model. "*": a difference at the 5% level after'
        f" Holm's correction over the {len(p)} comparisons of this table that are complete."
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [
        "## Differences",
        "",
        markdown_table(rows, columns),
        "",
        f"{legend} {verdict_legend('the reference', 'the margin of the comparison')}",
        "",
        f"![Differences]({path.stem}.png)",
        "",
    ]


def _title(plan: Comparison) -> str:
    """The name of a comparison without the word that all share."""
    return plan.name.partition("_")[2] or plan.name


def _cell(plan: Comparison, label: str, gap: Difference, p: float | None) -> str:
    verdict = verdict_of(plan, label, gap)
    return f"{gap}{' *' if p is not None and p < 0.05 else ''}{f', {verdict}' if verdict else ''}"
