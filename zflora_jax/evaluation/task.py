"""Scores of a model on tasks: loss, generated answers and likelihoods, on all rows and on those
that are clean (not in the training data); resumable.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, fingerprint, require_fit
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.core.storage import as_path, output_path
from zflora_jax.data.builders.public import NAMED
from zflora_jax.data.dates import dated
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.mixture import TrainedOn, has_own_rows, load_mixture, source_splits
from zflora_jax.data.tasks import GROUPS, Example, get_task
from zflora_jax.evaluation.contamination import contaminated, questions
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.records import Record, generation_records, likelihood_records
from zflora_jax.evaluation.scores import (
    UNIT,
    as_dicts,
    group_scores,
    rows_by_kind,
    rows_kept,
    scores_of,
    shared_units,
)
from zflora_jax.evaluation.summary import summary_page
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import atomic_write, write_json, write_result
from zflora_jax.reporting.progress import progress_bar
from zflora_jax.reporting.provenance import environment
from zflora_jax.training.identity import require_same_settings

log = logging.getLogger(__name__)

Result = dict[str, Any]


def evaluate(
    run: RunConfig,
    model: Model,
    *,
    out: str | Path | None = None,
    trained_on: Sequence[Example] | None = None,
    console: bool = True,
) -> Result:
    """Scores a base or fused model on `run.data.task` (one task), with the settings `run.eval`.

    Args:
      run: Settings of the task, its rows and their scores.
      model: A base or fused model.
      out: A path without suffix: <out>.json gets the result, <out>.jsonl one line per example with
        its prompt, output, parsed answers and scores. While it runs, <out>.*.partial.jsonl hold
        finished batches, from which a stopped evaluation resumes.
      trained_on: The training examples. A test question that is one of theirs (normalised text) is
        marked, and every score is reported for all rows and for the clean ones.
      console: Whether progress is shown.

    Returns:
      task, split, rows, with trained_on clean_rows, loss, accuracy and the other scores
      (`scores.SCORES`) as numbers, and `scores`: rows ("all", "clean") -> score -> mean, low, high
      (95%, bootstrap). The loss uses rows that fit data.bucket_lengths, with documents cut to them;
      answers use prompts as long as the context allows (eval.max_prompt_tokens).

    Raises:
      ConfigError: The task is a mixture, no row is clean, eval.clean_only is set without
        trained_on, or `out` cannot be written.
    """
    seen = None if trained_on is None else questions(trained_on)
    out = None if out is None else as_path(out, "out")
    # In every process, also if only one was given `out`.
    distributed.on_main(lambda: None if out is None else output_path(f"{out}.json", "out"))
    result, _ = _answered(_begun(run, model, seen, console), model, out, console)
    _remove_partials(out)
    return result


@dataclasses.dataclass(frozen=True)
class _Begun:
    """The rows of a task, compared with the training data, and the model's loss on them."""

    run: RunConfig
    name: str
    examples: Sequence[Example]
    records: list[Record]
    result: Result
    seconds: float


def _begun(run: RunConfig, model: Model, seen: frozenset[str] | None, console: bool) -> _Begun:
    """Reads a task's rows and computes the loss. seen: Normalised questions of the training data;
    None if no training data was named.
    """
    started, run = time.perf_counter(), one_day(run)
    require_fit(run, model)
    name, examples, records, result = _rows(run, seen)
    # A process with other rows would wait for the others, or change their results.
    same = [dataclasses.replace(example, where="") for example in examples]
    digest = hashlib.sha256(repr((same, records)).encode()).hexdigest()
    distributed.require_equal({f"rows of {name}": len(examples), f"content of {name}": digest})
    result |= {key: getattr(model.config.execution, key) for key in ("dtype", "matmul_precision")}
    shown = console and distributed.is_main()
    if run.train.pairs and run.eval.loss:
        log.warning(
            "%s: train.loss=dpo has no loss without unmerged adapters; see report.json", name
        )
    elif run.eval.loss:
        encoded = tokenize_examples(examples, model.tokenizer, run.data, model.config.vocab_size)
        with progress_bar(len(encoded), f"{name}: loss", shown) as advance:
            loss = held_out_loss(run, model, encoded, on_batch=advance if shown else None)
        result |= {"loss": loss["loss"], "loss_rows": int(loss["rows"])}
        result["loss_documents_cut"] = encoded.truncated
    return _Begun(run, name, examples, records, result, time.perf_counter() - started)


def _answered(
    begun: _Begun, model: Model, out: Path | None, console: bool
) -> tuple[Result, list[Record]]:
    """Scores a model, which may now be packed, for `evaluate`; the caller removes the files of
    finished batches. Returns (the result, one record per row).
    """
    run, name, examples, records = begun.run, begun.name, begun.examples, begun.records
    started, env, shown = time.perf_counter(), environment(), console and distributed.is_main()
    # Part -> its function, the rows that it scores.
    parts: dict[str, tuple[Callable[..., list[Record]], Sequence[int]]] = {}
    chosen = [i for i, example in enumerate(examples) if example.options]
    if run.eval.likelihood and chosen:
        parts["likelihood"] = likelihood_records, chosen
    if run.eval.generate:
        everything = range(len(examples))
        parts["generation"] = functools.partial(generation_records, task_name=name), everything
    for kind, (make, rows) in parts.items():
        with progress_bar(len(rows), f"{name}: {kind}", shown) as advance:
            fresh = make(
                model=model,
                examples=[examples[i] for i in rows],
                data=run.data,
                evaluation=run.eval,
                partial=_partial(out, kind),
                on_batch=advance,
            )
        for i, new in zip(rows, fresh, strict=True):
            records[i] |= new
    result = begun.result | _facts(examples, records) | _scores(run, records)
    result["seconds"] = begun.seconds + time.perf_counter() - started
    if out is not None and distributed.is_main():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic_write(f"{out}.jsonl", lines.encode())
        write_json(f"{out}.json", result | {"config": to_dict(run), "environment": env})
    return result, records


def one_day(run: RunConfig, **more: Any) -> RunConfig:
    """Returns `run` with the date of process 0 (today if it has none) for all chat templates.
    ConfigError in all processes if other settings, or the JSON values `more`, differ.
    """
    day = distributed.from_process_0(dated(run).data.date)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, date=day))
    require_same_settings(run)
    distributed.require_equal(more)
    return run


def _rows(
    run: RunConfig, seen: frozenset[str] | None
) -> tuple[str, list[Example], list[Record], Result]:
    """Compares the rows that `run.eval` selects with the questions `seen` in training.

    Returns:
      (The task's name, its examples, the first fields of their records, and of the result.)
    """
    evaluation = run.eval
    mixture = load_mixture(
        run.data, evaluation.split, None if evaluation.clean_only else evaluation.limit
    )
    require(
        len(mixture.names) == 1,
        f"data.task={run.data.task!r} is a mixture; evaluate one at a time (--tasks"
        f" {','.join(mixture.names)}).",
    )
    require(
        seen is not None or not evaluation.clean_only,
        "eval.clean_only=True needs the training data to compare with; name it with --trained-on.",
    )
    (name,) = mixture.names
    marks = [] if seen is None else contaminated(mixture, seen)
    left_out = marks if evaluation.clean_only else [False] * len(mixture)
    kept = [i for i, out in enumerate(left_out) if not out][: evaluation.limit]
    require(
        bool(kept),
        f"{name}: every question of its {evaluation.split} split is in the training data, so"
        " eval.clean_only=True leaves none.",
    )
    examples = [mixture[i] for i in kept]
    records: list[Record] = [
        {"index": i, "prompt": e.prompt, "input": e.input, "answer": e.answer or e.target}
        for i, e in zip(kept, examples, strict=True)
    ]
    if (units := shared_units([example.unit for example in examples])) is not None:
        records = [record | {UNIT: unit} for record, unit in zip(records, units, strict=True)]
    result: Result = {"task": name, "split": evaluation.split, "rows": len(kept)}
    if seen is None:
        return name, examples, records, result
    records = [record | {"contaminated": marks[record["index"]]} for record in records]
    if any(marks):
        log.warning("%s: %d of %d questions are in the training data", name, sum(marks), len(marks))
    clean = [record["contaminated"] for record in records].count(False)
    result |= {"questions": len(marks), "contaminated": sum(marks), "clean_rows": clean}
    return name, examples, records, result


def _facts(examples: Sequence[Example], records: Sequence[Record]) -> Result:
    """Returns facts that a reader needs next to the scores: answers and documents cut, chance."""
    facts: Result = {}
    if "document_cut" in records[0]:
        facts["documents_cut"] = sum(record["document_cut"] for record in records)
    if "cut" in records[0]:
        facts["answers_cut"] = sum(record["cut"] for record in records)
        compared = sum("correct" in record for record in records)
        if 0 < compared < len(records):
            facts["rows_with_answer"] = compared
    guesses = [1 / len(example.options) for example in examples if example.options]
    if guesses:
        facts["chance"] = sum(guesses) / len(guesses)
    if 0 < len(guesses) < len(examples):
        facts["rows_with_options"] = len(guesses)
    return facts


def _scores(run: RunConfig, records: Sequence[Record]) -> Result:
    """Returns the scores by name, those of clean rows as NAME_clean, and all with intervals."""
    kinds = rows_by_kind(records, run.eval.clean_only)
    scores = {kind: scores_of(rows, run.eval.seed) for kind, rows in kinds.items()}
    first = next(iter(scores.values()))
    return {
        **{name: score.mean for name, score in first.items()},
        **{f"{name}_clean": score.mean for name, score in scores.get("clean", {}).items()},
        "prompt_style": run.eval.prompt_style or run.data.prompt_style,
        "scores": {kind: as_dicts(found) for kind, found in scores.items()},
    }


def _partial(out: str | Path | None, kind: str) -> Path | None:
    return None if out is None else as_path(f"{out}.{kind}.partial.jsonl")


def _remove_partials(out: str | Path | None) -> None:
    """Deletes the files of finished batches of a task that was evaluated to `out`."""
    for kind in ("likelihood", "generation"):
        if (path := _partial(out, kind)) is not None and distributed.is_main():
            path.unlink(missing_ok=True)


def evaluate_tasks(
    run: RunConfig,
    model: Model,
    tasks: Iterable[str],
    out: str | Path,
    label: str,
    *,
    trained_on: Sequence[TrainedOn] | None = None,
    console: bool = True,
    donate: bool = False,
) -> Result:
    """Scores a model on several tasks, and averages over the tasks of each group.

    The summary is <out>/summary-<split>-<label>.json and .md; task files (see `evaluate`) are
    <out>/<task>-<split>-<label>.json and .jsonl. The same call resumes a stopped evaluation.
    Processes that share the model call this together.

    Args:
      run: Settings of scoring, and of the tasks' files.
      model: A base or fused model.
      tasks: Names of the tasks.
      out: The folder of the files.
      label: Name of the model in the files' names.
      trained_on: Training data to search for test questions, without the split that a run of this
        project held out for the task itself.
      console: Whether progress is shown.
      donate: Whether to empty `model.params` on the way, see `pack_for_decode`.

    Returns:
      The content of the summary's JSON.

    Raises:
      ConfigError: An error of `check_tasks`; the label has a /, `out` cannot be written, or it has
        a summary of another model or other settings.
    """
    tasks = [*tasks]
    require("/" not in label, f"label {label!r} is part of files' names: leave out the /.")
    out, env, run = as_path(out, "out"), environment(), one_day(run, tasks=tasks, label=label)
    distributed.on_main(lambda: output_path(out, "out", folder=True))
    tasks = check_tasks(run, tasks)
    path, origin = out / f"summary-{run.eval.split}-{label}", _origin(run, model, tasks)
    distributed.on_main(lambda: _refuse_other(as_path(f"{path}.json"), origin))
    seen = _seen_by_task(run, tasks, trained_on)
    files = {task: out / f"{task}-{run.eval.split}-{label}" for task in tasks}
    results, records = _score_all(run, model, files, seen, console, donate)
    summary = {"label": label, "tasks": results, "groups": _groups(run.eval, records)}
    summary |= {"origin": origin, "config": to_dict(run), "environment": env}
    if distributed.is_main():
        write_result(path, summary, summary_page(summary))
    for file in files.values():
        _remove_partials(file)
    return summary


def _score_all(
    run: RunConfig,
    model: Model,
    files: Mapping[str, Path],
    seen: Mapping[str, frozenset[str] | None],
    console: bool,
    donate: bool,
) -> tuple[list[Result], dict[str, list[Record]]]:
    """Returns the result of each task of `files`, and its records by task."""
    results, records, begun = [], {}, {}
    for task in files:  # the loss of all, before the model is packed
        one = dataclasses.replace(run, data=dataclasses.replace(run.data, task=task))
        begun[task] = _begun(one, model, seen[task], console)
    if donate:
        model = pack_for_decode(model, donate=True)
    for task, file in files.items():
        result, records[task] = _answered(begun[task], model, file, console)
        clean = rows_by_kind(records[task], clean_only=True)
        results.append(result | (rows_kept(clean["clean"]) if clean else {}))
    return results, records


def check_tasks(run: RunConfig, tasks: Sequence[str]) -> list[str]:
    """Checks before anything slow that tasks and their files exist; returns their names.

    Raises:
      ConfigError: A task is unknown, or files are missing.
    """
    names = [get_task(task).name for task in tasks]
    for task in names:
        load_mixture(dataclasses.replace(run.data, task=task), run.eval.split, 1)
    return names


def _seen_by_task(
    run: RunConfig, tasks: Sequence[str], trained_on: Sequence[TrainedOn] | None
) -> dict[str, frozenset[str] | None]:
    """Returns task -> normalised questions that the model has seen; None where unknown."""
    if trained_on is None:
        log.warning(
            "no training data was named, so test questions are not checked for contamination; see"
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


def _groups(evaluation: EvalConfig, records: Mapping[str, Sequence[Record]]) -> Result:
    """Returns group -> its tasks, and their mean scores on all and on clean rows."""
    groups: Result = {}
    for group, members in GROUPS.items():
        present = [task for task in records if task in members]
        if len(present) < 2:
            continue
        tables = [rows_by_kind(records[task], evaluation.clean_only) for task in present]
        groups[group] = {"tasks": present} | {
            kind: as_dicts(group_scores([table[kind] for table in tables], evaluation.seed))
            for kind in tables[0]
        }
    return groups


def _origin(run: RunConfig, model: Model, tasks: Sequence[str]) -> Result:
    """Returns the model's fingerprint and the settings that decide its scores."""
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
            if key not in ("batch_size", "seed")
        },
    }


def _refuse_other(path: Path, origin: Result) -> None:
    """Raises ConfigError for an existing summary of another model or of other settings."""
    if not path.is_file():
        return
    found = json.loads(path.read_text("utf-8"))["origin"]
    other = [
        key for key, value in json.loads(json.dumps(origin)).items() if found.get(key) != value
    ]
    require(
        not other,
        f"{path} holds scores of other settings ({', '.join(other)}); give another --out, or"
        " move them away.",
    )
