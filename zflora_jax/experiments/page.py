"""The pages of sweeps: their tables, and what a reader has to know beside them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import to_dict
from zflora_jax.core.run_config import EvalConfig
from zflora_jax.data.cloze import CLOZE
from zflora_jax.data.mixture import parse_mixture
from zflora_jax.evaluation.statistics import SuiteScore
from zflora_jax.evaluation.summary import decoding, score_legend
from zflora_jax.experiments.comparison import BASE, Comparison
from zflora_jax.experiments.difference_view import difference_blocks
from zflora_jax.experiments.differences import Differences
from zflora_jax.experiments.store import ORIGIN, Result
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import commit_text, origin_line
from zflora_jax.reporting.tables import markdown_table

# Fields of a method's row that the table of losses does not show: scores have tables of their own.
_APART = (
    "untuned",
    "scores",
    "all scores",
    "intervals",
    "headline",
    "mean",
    "std",
    "rows",
    "cut",
    "chance",
)


def write_page(path: Path, blocks: Sequence[str], values: Mapping[str, Any]) -> None:
    """Write a page and its numbers.

    Args:
      path: of the Markdown; the JSON has the same name.
      blocks: paragraphs, tables and headings; empty ones are left out.
      values: what the JSON holds.
    """
    write_result(path.with_suffix(""), values, "\n\n".join(filter(None, blocks)) + "\n")


def runs_made_at(results: Iterable[Result]) -> str:
    """Where the runs behind a page were made, and how many in each place. Records of earlier
    versions know the commit alone.
    """

    def place(result: Result) -> str:
        known = [f"{key} {result[key]}" for key in ("device", "cpu", "jax") if result.get(key)]
        return ", ".join([f"commit {commit_text(result)}", *known])

    made = Counter(place(result) for result in results if "commit" in result)
    return f"Runs made at {'; '.join(f'{how} ({n})' for how, n in made.items())}." if made else ""


# --- grids ----------------------------------------------------------------------------------------


def grid_page(name: str, rows: Sequence[Result], total: int, env: Mapping[str, Any]) -> list[str]:
    """The blocks of a grid's page.

    Args:
      name: its title.
      rows: of the runs so far.
      total: number of runs.
      env: of the process that writes it.
    """
    hidden = ("run", *ORIGIN, "data_wait_share")
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    done = f"{len(rows)} of {total} runs."
    return [
        f"# {name}",
        markdown_table(shown, columns),
        f"{done} {runs_made_at(rows)}".rstrip(),
        origin_line(env),
    ]


# --- comparisons ----------------------------------------------------------------------------------


def comparison_page(
    plan: Comparison,
    found: Result,
    scores: Mapping[str, SuiteScore],
    compared: Differences,
) -> list[str]:
    """The blocks of a comparison's page.

    Args:
      plan: what is compared.
      found: what the comparison's JSON holds, so far.
      scores: label of a method, or BASE -> its scores; empty without tasks.
      compared: its differences; empty without a reference.
    """
    trained = [row for row in found["rows"] if row["method"] != BASE]
    missing = f"Not run yet: {', '.join(found['missing'])}." if found["missing"] else ""
    failed = [
        f"{run['method']}, seed {run['seed']}, learning rate {run['learning_rate']:g}:"
        f" {run['failed']}"
        for run in found["runs"]
        if "failed" in run
    ]
    # A run that chose the learning rate may be one that is chosen: it counts once.
    runs = {(r["method"], r["learning_rate"], r["steps"], r["seed"]): r for r in found["runs"]}
    makes = "Without --tables it" if "--tables" in found["environment"]["command"] else "It"
    resumed = (
        f"{makes} makes the runs that have no record in {plan.name}/; --out DIR elsewhere makes all"
        " of them."
    )
    return [
        f"# {plan.name}",
        plan.reading if not found["missing"] else "",  # it is of all runs
        _setting(plan, found),
        *difference_blocks(plan, compared, scores),
        _loss_table(trained),
        *_score_blocks(plan, trained, scores),
        missing,
        f"Failed: {'; '.join(failed)}" if failed else "",
        runs_made_at(runs.values()),
        f"{origin_line(found['environment'])} {resumed}",
    ]


def _setting(plan: Comparison, found: Result) -> str:
    """What was trained, on what, and how the learning rates were chosen."""
    run, base = plan.base, found["base"]
    first = next((r for r in found["runs"] if "test_rows" in r), None)
    packed = "packed " if run.data.packing else ""
    cloze = all(name.endswith(CLOZE) for name in parse_mixture(run.data.task)[0])
    style = "plain, as of all cloze tasks" if cloze else run.data.prompt_style
    plural = "s" if run.data.batch_size > 1 else ""
    loss_on = "prompt and completion" if run.data.train_on_prompt else "the completion only"
    text = (
        f"Mean cross-entropy (nats per target token) on held-out rows of `{run.data.task}`;"
        f" {run.model}, {run.train.dtype}, {run.train.steps} steps of {run.data.batch_size}"
        f" {packed}row{plural}, prompt style {style}, loss on {loss_on}, examples"
        f" up to {run.data.bucket_lengths[-1]} tokens"
    )
    untrained = f"Untrained: validation {base['validation']:.4f}, test {base['test']:.4f}"
    if first:
        cut = first.get("train_documents_cut")
        text += (
            f" ({first['train_rows']} train examples, {first['train_rows_dropped']} longer ones"
            f" left out{f', {cut} cut to fit' if cut else ''})"
        )
        untrained += f" ({first['test_rows']} rows, {first['test_tokens']} target tokens)"
    remarks = [
        f"{row['method']}: the rate {row['learning rate']:g} is {row['untuned']}."
        for row in found["rows"]
        if row.get("untuned")
    ]
    return "\n".join([f"{text}.", f"{untrained}.", _chosen_by(plan), *remarks])


def _chosen_by(plan: Comparison) -> str:
    how = f"by runs of {plan.pick_steps} steps" if plan.pick_steps else "by whole runs"
    return (
        f"The learning rate is chosen on validation with seed {plan.seeds[0]}, {how}; test columns"
        " are at the chosen rate."
    )


def _loss_table(rows: Sequence[Result]) -> str:
    shown = [
        {
            key: (
                f"{value:.4f}"
                if key.startswith(("validation", "test")) and value is not None
                else value
            )
            for key, value in row.items()
            if key not in _APART
        }
        for row in rows
    ]
    fullest = sorted(shown, key=len, reverse=True)  # its order: others can have fewer seeds
    columns = list(dict.fromkeys(key for row in fullest for key in row))
    note = "Seconds are of a run's training; only those of an idle machine can be compared."
    return f"{markdown_table(shown, columns)}\n\n{note}" if shown else ""


def _score_blocks(
    plan: Comparison, rows: Sequence[Result], scores: Mapping[str, SuiteScore]
) -> list[str]:
    """A table for each score, and what it is over."""
    if plan.scoring is None or not scores:
        return []
    trainable = {BASE: 0} | {row["method"]: row["trainable"] for row in rows}
    first = next(iter(scores.values()))
    kinds = list(dict.fromkeys(kind for score in scores.values() for kind in score.table))
    kinds.sort(key=lambda kind: kind != first.headline)
    blocks, shown = list[str](), dict[str, list[Any]]()
    for kind in kinds:
        values = [score.table.get(kind) for score in scores.values()]
        if same := [earlier for earlier, its in shown.items() if its == values]:
            blocks.append(f"{kind}: the same figures as {same[0]}.")
            continue
        shown[kind] = values
        lines = [
            {"method": label, "trainable": trainable[label]} | _score_cells(plan, score, kind)
            for label, score in scores.items()
            if kind in score.table
        ]
        columns = list(dict.fromkeys(key for line in lines for key in line))
        blocks += [f"## {kind}, percent", markdown_table(lines, columns)]
    chance = ", ".join(f"{task} {value:.1f}" for task, value in first.chance.items())
    cut = [
        f"{label}: {', '.join(f'{task} {n:.4g}' for task, n in score.answers_cut.items() if n)}"
        for label, score in scores.items()
        if any(score.answers_cut.values())
    ]
    return [
        *blocks,
        (
            f"{_rows_scored(plan.scoring)}, their number in round brackets"
            f"{f'; {decoding(to_dict(plan.scoring))}' if plan.scoring.generate else ''}."
            " Square brackets: the 95% interval over rows,"
            " of several seeds the means of its ends. ±: the standard deviation of seeds, which is"
            f" not in it. {_transfer(plan)}{score_legend(kinds)}"
        ),
        f"Chance: {chance}." if chance and set(first.chance) == set(first.rows) else "",
        f"Answers that reached the limit of new tokens, mean of seeds: {'; '.join(cut)}."
        if cut
        else "",
        f"![{plan.name}]({plan.name}.png)",
    ]


def _score_cells(plan: Comparison, score: SuiteScore, kind: str) -> dict[str, str]:
    """The tasks that count, their mean, the transfer tasks."""
    values = score.table[kind]

    def cells(tasks: Sequence[str]) -> dict[str, str]:
        return {
            f"{task} ({score.counted[kind][task]})": values[task].percent()
            for task in tasks
            if task in values
        }

    std = f" ± {score.std:.1f}" if kind == score.headline and score.std is not None else ""
    counted = [values[task].mean for task in plan.tasks if task in values]
    mean = {"mean": f"{statistics.mean(counted):.1f}{std}"} if counted else {}
    return cells(plan.tasks) | mean | cells(plan.transfer)


def _transfer(plan: Comparison) -> str:
    if not plan.transfer:
        return ""
    return f"mean: of {', '.join(plan.tasks)}; the tasks right of it are not counted. "


def _rows_scored(scoring: EvalConfig) -> str:
    limit, whose = scoring.limit, f"of each {scoring.split} set"
    if scoring.clean_only:
        return f"The first {limit} clean rows {whose}" if limit else f"All clean rows {whose}"
    return f"Clean rows, out of {f'the first {limit}' if limit else 'all'} {whose}"
