"""The page of a comparison: its tables, and what a reader has to know beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from zflora_jax.core.fields import require, to_dict
from zflora_jax.evaluation.scorecard import SCORE_LEGEND, decoding
from zflora_jax.experiments.comparison import BASE, Comparison, Result
from zflora_jax.reporting.tables import markdown_table

_DIRTY = " (with local changes)"


def score_fields(chosen: Sequence[Result]) -> Result:
    """Task -> headline score in percent, mean over seeds, under "scores"; every score under "all
    scores"; spread of the tasks' mean over seeds.
    """
    runs = [r["scores"] for r in chosen if r.get("scores")]
    if not runs:
        return {"scores": {}, "all scores": {}, "intervals": {}}
    kinds = list(
        dict.fromkeys(kind for task in runs[0].values() for kind in task["scores"]["clean"])
    )
    require(
        bool(kinds),
        "nothing was scored: no task has a clean row, or scoring switches off all that the tasks"
        " have.",
    )
    table = {
        kind: {
            task: 100 * statistics.mean(run[task]["scores"]["clean"][kind]["mean"] for run in runs)
            for task in runs[0]
            if kind in runs[0][task]["scores"]["clean"]
        }
        for kind in kinds
    }

    def bounds(task: str, kind: str) -> list[float]:
        return [
            100 * statistics.mean(run[task]["scores"]["clean"][kind][end] for run in runs)
            for end in ("low", "high")
        ]

    intervals = {
        kind: {task: bounds(task, kind) for task in tasks} for kind, tasks in table.items()
    }
    head = kinds[kinds.index("accuracy") if "accuracy" in kinds else 0]
    means = [
        100 * statistics.mean(run[task]["scores"]["clean"][head]["mean"] for task in table[head])
        for run in runs
    ]
    rows = {task: runs[0][task]["clean_rows"] for task in runs[0]}
    return {
        "scores": table[head],
        "all scores": table,
        "intervals": intervals,
        "headline": head,
        "mean": statistics.mean(means),
        "spread": max(means) - min(means),
        "rows": rows,
        "cut": {
            task: statistics.mean(run[task]["answers_cut"] for run in runs)
            for task in runs[0]
            if "answers_cut" in runs[0][task]
        },
        "chance": {
            task: 100 * runs[0][task]["chance"] for task in runs[0] if "chance" in runs[0][task]
        },
    }


def comparison_page(plan: Comparison, result: Result) -> str:
    run, env, first = (
        plan.base,
        result["environment"],
        next((r for r in result["runs"] if "test_rows" in r), None),
    )
    hidden = (
        "untuned",
        "scores",
        "all scores",
        "intervals",
        "headline",
        "mean",
        "spread",
        "rows",
        "cut",
        "chance",
    )
    trained = [row for row in result["rows"] if row["method"] != BASE]
    shown = [
        {
            k: f"{v:.4f}" if k.startswith(("validation", "test")) and v is not None else v
            for k, v in row.items()
            if k not in hidden
        }
        for row in trained
    ]
    packed = "packed " if run.data.packing else ""
    picker = plan.rates_from or plan
    picked = f"by runs of {picker.pick_steps} steps" if picker.pick_steps else "by whole runs"
    where = (
        f"the validation split of `{picker.base.data.task}` (as in {picker.name})"
        if picker is not plan
        else "validation"
    )
    lines = [
        f"# {plan.name}",
        "",
        f"Mean cross-entropy (nats per target token) on held-out rows of `{run.data.task}`;"
        f" {run.model}, {run.train.dtype}, {run.train.steps} steps of {run.data.batch_size}"
        f" {packed}row{'s' if run.data.batch_size > 1 else ''}, prompt style"
        f" {run.data.prompt_style}, loss on"
        f" {'prompt and completion' if run.data.train_on_prompt else 'the completion only'},"
        f" examples up to {run.data.bucket_lengths[-1]} tokens"
        + (
            f" ({first['train_rows']} train examples, {first['train_rows_dropped']} longer ones"
            " left out)."
            if first
            else "."
        ),
        f"Untrained: validation {result['base']['validation']:.4f}, test"
        f" {result['base']['test']:.4f}"
        + (
            f" ({first['test_rows']} rows, {first['test_tokens']} target tokens)." if first else "."
        ),
        (
            f"The learning rate is chosen on {where} with seed {picker.seeds[0]}, {picked}; test"
            " columns are at the chosen rate."
        ),
        *[
            f"{row['method']}: the rate {row['learning rate']:g} is {row['untuned']}."
            for row in trained
            if row["untuned"]
        ],
        "",
        markdown_table(shown, list(dict.fromkeys(k for row in shown for k in row))),
        "",
    ]
    for kind in dict.fromkeys(kind for row in result["rows"] for kind in row["all scores"]):
        lines += [f"## {kind}, percent", "", _score_table(plan, result["rows"], kind), ""]
    if plan.scoring is not None:
        limit, clean_only = plan.scoring.limit, plan.scoring.clean_only
        if clean_only:
            rows = (
                f"The first {limit} clean rows of each test set"
                if limit
                else "All clean rows of each test set"
            )
        else:
            rows = f"Clean rows, out of {f'the first {limit}' if limit else 'all'} of each test set"
        lines += [
            f"{rows}, their number in brackets; {decoding(to_dict(plan.scoring))}. {SCORE_LEGEND}",
            "",
        ]
        if (chance := result["rows"][0]["chance"]) and set(chance) == set(
            result["rows"][0]["rows"]
        ):
            lines += [
                f"Chance: {', '.join(f'{task} {value:.1f}' for task, value in chance.items())}.",
                "",
            ]
        cut = [
            f"{row['method']}"
            f" {' '.join(f'{task} {count:g}' for task, count in row['cut'].items() if count)}"
            for row in result["rows"]
            if any(row.get("cut", {}).values())
        ]
        lines += (
            [f"Answers that reached the limit of new tokens: {'; '.join(cut)}.", ""] if cut else []
        )
        lines += [f"![{plan.name}]({plan.name}.png)", ""]
    lines += [plan.reading, ""] if plan.reading else []
    lines += [f"Not run yet: {', '.join(result['missing'])}.", ""] if result["missing"] else []
    # A run that chose the learning rate may be one that is chosen: it counts once.
    runs = {
        (run["method"], run["learning_rate"], run["steps"], run["seed"]): run
        for run in result["runs"]
    }
    known = [run for run in runs.values() if "commit" in run]
    made = Counter(
        f"commit {run['commit']}{_DIRTY * bool(run['dirty'])}, device {run['device']}, jax"
        f" {run['jax']}"
        for run in known
    )
    lines += (
        [f"Runs made at {'; '.join(f'{how} ({count})' for how, count in made.items())}.", ""]
        if made
        else []
    )
    written = (
        f"Page written by `{env['command']}`; commit {env['commit']}{_DIRTY * bool(env['dirty'])}"
    )
    lines += [
        (
            f"{written}; {env['date']}. Runs whose record is in {plan.name}/ are not made again;"
            " --out DIR elsewhere makes all of them."
        ),
        "",
    ]
    return "\n".join(lines)


def _score_table(plan: Comparison, rows: Sequence[Result], kind: str) -> str:
    counts = next(row["rows"] for row in rows if row["scores"])
    lines = []
    for row in rows:
        if values := row["all scores"].get(kind):
            spread = (
                f" ± {row['spread']:.1f}"
                if len(plan.seeds) > 1 and row["method"] != BASE and values == row["scores"]
                else ""
            )
            between = row["intervals"][kind]
            cells = {
                f"{task} ({counts[task]})": "{:.1f} [{:.1f}, {:.1f}]".format(value, *between[task])
                for task, value in values.items()
            }
            lines.append(
                {"method": row["method"], "trainable": row["trainable"]}
                | cells
                | {"mean": f"{statistics.mean(values.values()):.1f}{spread}"}
            )
    return markdown_table(lines, list(dict.fromkeys(k for line in lines for k in line)))
