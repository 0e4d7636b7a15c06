"""Scores of a model on several tasks, their means by group, and the page of both; resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.data.builders.public import NAMED
from zflora_jax.data.mixture import TrainedOn, has_own_rows, load_mixture, source_splits
from zflora_jax.data.tasks import GROUPS, get_task
from zflora_jax.evaluation.contamination import questions
from zflora_jax.evaluation.statistics import (
    as_dicts,
    group_scores,
    rows_kept,
)
from zflora_jax.evaluation.summary import summary_page
from zflora_jax.evaluation.task import Evaluated, Result, evaluate_task, one_day, remove
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment

log = logging.getLogger(__name__)


def check_tasks(run: RunConfig, tasks: Sequence[str]) -> list[str]:
    """Check that tasks exist and their files are there, to be said before anything slow.

    Returns:
      Their names of today.

    Raises:
      ConfigError: an unknown task, or files that are missing.
    """
    names = [get_task(task).name for task in tasks]
    for task in names:
        load_mixture(dataclasses.replace(run.data, task=task), run.eval.split, 1)
    return names


def evaluate_tasks(
    run: RunConfig,
    model: Model,
    tasks: Sequence[str],
    out: str | Path,
    label: str,
    *,
    trained_on: Sequence[TrainedOn] | None = None,
    replace: bool = False,
    console: bool = True,
) -> Result:
    """`evaluate` on each of `tasks`, then <out>/summary-<split>-<label>.json and .md: a row per
    task, and the mean over the tasks of each group.

    Task files are <out>/<task>-<split>-<label>.json and .jsonl. If it was stopped, the same call
    goes on where it was. Processes that share the model call this together; process 0 writes.

    Args:
      run: how they are scored, and where their files are.
      model: base or fused.
      tasks: their names.
      out: the folder of the files.
      label: of the model, in the files' names.
      trained_on: where test questions are looked for, as `evaluate` does with rows; what a run of
        this project trained on never includes the split that it held out for the task itself.
      replace: whether a summary of that name may be replaced, whatever it is of.
      console: whether progress is shown.

    Returns:
      what the summary's JSON holds.

    Raises:
      ConfigError: as `check_tasks`; or `out` holds a summary of that name of another model, of
        other settings, or of more rows of a task.
    """
    out, env, run = as_path(out, "out"), environment(), one_day(run)
    tasks = check_tasks(run, tasks)
    path = out / f"summary-{run.eval.split}-{label}"
    origin = _origin(run, model, tasks)
    if not replace:
        distributed.on_main(lambda: _refuse_other(as_path(f"{path}.json"), origin, run, tasks))
    seen = _seen_by_task(run, tasks, trained_on)
    done = {}
    for task in tasks:
        one = dataclasses.replace(run, data=dataclasses.replace(run.data, task=task))
        to = out / f"{task}-{run.eval.split}-{label}"
        done[task] = evaluate_task(one, model, to, seen[task], console)
    summary = {
        "label": label,
        "tasks": [_result(of, trained_on is not None) for of in done.values()],
        "groups": _groups(run.eval, done, trained_on is not None),
        "origin": origin,
        "config": to_dict(run),
        "environment": env,
    }
    if distributed.is_main():
        write_result(path, summary, summary_page(summary))
    for evaluated in done.values():
        remove(evaluated.partials)
    return summary


def _result(done: Evaluated, checked: bool) -> Result:
    """The result of a task; where contamination was checked, with the scores of each clean row."""
    return done.result | (rows_kept(done.clean_records()) if checked else {})


def _seen_by_task(
    run: RunConfig, tasks: Sequence[str], trained_on: Sequence[TrainedOn] | None
) -> dict[str, frozenset[str] | None]:
    """Task -> the normalised questions that the model has seen; None where that is not known."""
    if trained_on is None:
        log.warning(
            "no training data was named, so no test question is checked against any; see"
            " --trained-on"
        )
        return dict.fromkeys(tasks)
    sources = [
        ((get_task(name).dataset, split) if given.here else None, questions(rows))
        for given in trained_on
        for name, split, rows in source_splits(given.data)
    ]
    return {
        task: frozenset[str]().union(
            *(found for own, found in sources if own != (get_task(task).dataset, run.eval.split))
        )
        for task in tasks
    }


def _groups(evaluation: EvalConfig, done: Mapping[str, Evaluated], checked: bool) -> Result:
    """Group -> its tasks, and their mean scores on all and on clean rows."""
    groups: Result = {}
    for group, members in GROUPS.items():
        present = [task for task in done if task in members]
        if len(present) < 2:
            continue
        rows = {} if evaluation.clean_only else {"all": [done[task].records for task in present]}
        if checked:
            rows["clean"] = [done[task].clean_records() for task in present]
        groups[group] = {"tasks": present} | {
            kind: as_dicts(group_scores(tables, evaluation.seed)) for kind, tables in rows.items()
        }
    return groups


def _origin(run: RunConfig, model: Model, tasks: Sequence[str]) -> Result:
    """What a summary is of: the model, and the settings that decide its scores."""
    own = has_own_rows(tasks)
    folder = run.data.data_dir or ""
    if own and not folder.startswith(NAMED):
        folder = str(Path(folder).expanduser().resolve())
    return {
        "model": fingerprint(model),
        "data.prompt_style": run.data.prompt_style,
        **({"data.data_dir": folder} if own else {}),
        **{
            f"eval.{key}": value
            for key, value in to_dict(run.eval).items()
            if key not in ("batch_size", "limit", "seed")
        },
    }


def _refuse_other(path: Path, origin: Result, run: RunConfig, tasks: Sequence[str]) -> None:
    """Keep a summary of another model or other settings, and rows that would not be scored anew."""
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(origin))
    other = [key for key, value in now.items() if found["origin"].get(key) != value]
    require(
        not other,
        f"{path} holds scores of other settings ({', '.join(other)}); give another --out, or"
        " move them away.",
    )
    rows = {of["task"]: of["rows"] for of in found["tasks"] if of["task"] in tasks}
    more = [f"{n} of {task}" for task, n in rows.items() if n > (run.eval.limit or n)]
    require(
        not more,
        f"{path} holds scores of more rows than eval.limit={run.eval.limit} ({', '.join(more)});"
        " give another --out, or move them away.",
    )
