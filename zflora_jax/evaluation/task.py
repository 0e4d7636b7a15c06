"""Scores of a model on one task: loss, generated answers and likelihoods, on all rows and on those
that are not in the training data; resumable.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, require_fit
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.data.dates import dated
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation.contamination import contaminated, questions
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.records import Record, generation_records, likelihood_records
from zflora_jax.evaluation.statistics import UNIT, as_dicts, scores_of
from zflora_jax.evaluation.units import shared_units
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.progress import progress_bar
from zflora_jax.reporting.provenance import environment

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
    """Score a base or fused model on `run.data.task` (one task), as `run.eval` says.

    Args:
      run: which task, from where, and how it is scored.
      model: base or fused.
      out: a path without suffix: <out>.json gets the result, <out>.jsonl one line per example with
        its prompt, output, parsed answers and scores (of rows that belong together also the number
        of their unit, `evaluation.units`), and <out>.*.partial.jsonl, while it runs, what a stopped
        evaluation goes on from.
      trained_on: the training examples; a test question that is one of theirs (normalised text) is
        marked, and every score is given on all rows and on the clean ones.
      console: whether progress is shown.

    Returns:
      task, split, rows, with trained_on clean_rows, loss, accuracy and the other scores
      (`statistics.SCORES`) as numbers, and `scores`: rows ("all", "clean") -> score -> mean, low,
      high (95%, bootstrap). The loss is over rows that fit data.bucket_lengths, documents cut to
      them; answers are generated from prompts as long as the context allows
      (eval.max_prompt_tokens).

    Raises:
      ConfigError: a mixture, eval.clean_only without trained_on, or no row that is clean.
    """
    done = evaluate_task(
        run, model, out, None if trained_on is None else questions(trained_on), console
    )
    remove(done.partials)
    return done.result


@dataclass(frozen=True)
class Evaluated:
    """One task's result and records, and the files of finished batches, for the caller to remove
    when all that it evaluates is done.
    """

    result: Result
    records: list[Record]
    partials: list[Path]

    def clean_records(self) -> list[Record]:
        return [record for record in self.records if not record["contaminated"]]


@dataclass(frozen=True)
class _Rows:
    """The rows of a split that are scored.

    Attributes:
      index, examples: of each row: its number in the split, and itself.
      marks: per question of the whole split, whether it is in the training data; None where no
        training data was named.
    """

    task: str
    index: list[int]
    examples: list[Example]
    marks: list[bool] | None

    def records(self) -> list[Record]:
        records: list[Record] = [
            {"index": i, "prompt": e.prompt, "input": e.input, "answer": e.answer or e.target}
            for i, e in zip(self.index, self.examples, strict=True)
        ]
        if (units := shared_units([example.unit for example in self.examples])) is not None:
            records = [record | {UNIT: unit} for record, unit in zip(records, units, strict=True)]
        if self.marks is None:
            return records
        return [record | {"contaminated": self.marks[record["index"]]} for record in records]

    def fields(self) -> Result:
        if self.marks is None:
            return {}
        return {
            "questions": len(self.marks),
            "contaminated": sum(self.marks),
            "clean_rows": [self.marks[i] for i in self.index].count(False),
        }


def one_day(run: RunConfig) -> RunConfig:
    """`run` with the date of process 0, today if it has none, for the chat templates of all."""
    day = distributed.from_process_0(dated(run).data.date)
    return replace(run, data=replace(run.data, date=day))


def evaluate_task(
    run: RunConfig, model: Model, out: str | Path | None, seen: frozenset[str] | None, console: bool
) -> Evaluated:
    """As `evaluate`, with the records, and the files of finished batches left for the caller.

    Args:
      seen: the normalised questions of the training data; None where none was named.
    """
    out = None if out is None else as_path(out, "out")
    started, env, evaluation, run = time.perf_counter(), environment(), run.eval, one_day(run)
    require_fit(run, model)
    rows = _rows(run, seen)
    result: Result = {"task": rows.task, "split": evaluation.split, "rows": len(rows.examples)}
    result |= {key: getattr(model.config.execution, key) for key in ("dtype", "matmul_precision")}
    result |= rows.fields()
    if evaluation.loss:
        result |= _loss_fields(run, model, rows.examples)
    partials = {
        kind: None if out is None else as_path(f"{out}.{kind}.partial.jsonl")
        for kind in ("likelihood", "generation")
    }
    records = rows.records()
    for fresh in _answers(run, model, rows, partials, console):
        records = [record | new for record, new in zip(records, fresh, strict=True)]
    numbers, scores = _scores(evaluation, records, seen is not None)
    result |= _facts(rows, records) | numbers
    result |= {
        "prompt_style": evaluation.prompt_style or run.data.prompt_style,
        "scores": scores,
        "seconds": time.perf_counter() - started,
    }
    if out is not None and distributed.is_main():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        atomic_write(f"{out}.jsonl", lines.encode())
        write_json(f"{out}.json", result | {"config": to_dict(run), "environment": env})
    return Evaluated(result, records, [path for path in partials.values() if path is not None])


def _rows(run: RunConfig, seen: frozenset[str] | None) -> _Rows:
    """The rows that `run.eval` asks for, compared with the questions that were `seen` in
    training.
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
    marks = None if seen is None else contaminated(mixture, seen)
    left_out = marks if marks is not None and evaluation.clean_only else [False] * len(mixture)
    kept = [i for i, out in enumerate(left_out) if not out][: evaluation.limit]
    require(
        bool(kept),
        f"{name}: every question of its {evaluation.split} split is in the training data, so"
        " eval.clean_only=True leaves none.",
    )
    if marks is not None and any(marks):
        text = "%s: %d of %d questions are in the training data; " + (
            "they are left out"
            if evaluation.clean_only
            else "scores are given on all rows and on the clean ones"
        )
        log.warning(text, name, sum(marks), len(marks))
    return _Rows(name, kept, [mixture[i] for i in kept], marks)


def _loss_fields(run: RunConfig, model: Model, examples: Sequence[Example]) -> Result:
    encoded = tokenize_examples(examples, model.tokenizer, run.data, model.config.vocab_size)
    loss = held_out_loss(run, model, encoded)
    return {
        "loss": loss["loss"],
        "loss_rows": int(loss["rows"]),
        "loss_documents_cut": encoded.truncated,
    }


def _answers(
    run: RunConfig,
    model: Model,
    rows: _Rows,
    partials: Mapping[str, Path | None],
    console: bool,
) -> list[list[Record]]:
    """The records of likelihoods and of generated answers, as far as `run.eval` asks for them."""
    found, count = [], len(rows.examples)
    console = console and distributed.is_main()
    if run.eval.likelihood and all(example.options for example in rows.examples):
        with progress_bar(count, f"{rows.task}: likelihoods", console) as advance:
            found.append(
                likelihood_records(
                    model,
                    rows.examples,
                    run.data,
                    run.eval,
                    partial=partials["likelihood"],
                    on_batch=advance,
                )
            )
    if run.eval.generate:
        with progress_bar(count, f"{rows.task}: generating answers", console) as advance:
            found.append(
                generation_records(
                    model,
                    rows.task,
                    rows.examples,
                    run.data,
                    run.eval,
                    partial=partials["generation"],
                    on_batch=advance,
                )
            )
    return found


def _facts(rows: _Rows, records: Sequence[Record]) -> Result:
    """What a reader has to know beside the scores: answers and documents cut, chance."""
    facts: Result = {}
    if "document_cut" in records[0]:
        facts["documents_cut"] = sum(record["document_cut"] for record in records)
    if "cut" in records[0]:
        facts["answers_cut"] = sum(record["cut"] for record in records)
        compared = sum("correct" in record for record in records)
        if 0 < compared < len(records):
            facts["rows_with_answer"] = compared
    if all(example.options for example in rows.examples):
        guesses = [1 / len(example.options) for example in rows.examples]
        facts["chance"] = sum(guesses) / len(guesses)
    return facts


def _scores(
    evaluation: EvalConfig, records: Sequence[Record], checked: bool
) -> tuple[Result, Result]:
    """(the scores by their names, those of clean rows with "_clean" behind it; all of them with
    their intervals, by kind of rows).
    """
    scores = {} if evaluation.clean_only else {"all": scores_of(records, evaluation.seed)}
    if checked:
        clean = [record for record in records if not record["contaminated"]]
        scores["clean"] = scores_of(clean, evaluation.seed)
    first = scores.get("all", scores.get("clean", {}))
    fields: Result = {name: score.mean for name, score in first.items()}
    fields |= {f"{name}_clean": score.mean for name, score in scores.get("clean", {}).items()}
    return fields, {kind: as_dicts(found) for kind, found in scores.items()}


def remove(files: Sequence[Path]) -> None:
    """Delete those of `files` that are there."""
    for file in files if distributed.is_main() else ():
        file.unlink(missing_ok=True)
