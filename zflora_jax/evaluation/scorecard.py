"""Scores of a model on tasks: loss, generated answers, likelihoods, on all rows and on those that
are not in the training data; a table of tasks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, fingerprint, require_fit
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.data.dates import dated
from zflora_jax.data.mixture import TrainedOn, load_mixture, source_splits
from zflora_jax.data.tasks import GROUPS, Example, get_task
from zflora_jax.data.tokenization import tokenize_examples
from zflora_jax.evaluation.contamination import contaminated, questions
from zflora_jax.evaluation.evals import (
    Record,
    generation_records,
    group_scores,
    held_out_loss,
    likelihood_records,
    scores_of,
)
from zflora_jax.parallel.mesh import require_local
from zflora_jax.reporting.files import atomic_write, local_path, write_json
from zflora_jax.reporting.progress import progress_bar
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.tables import markdown_table

log = logging.getLogger(__name__)


def evaluate(
    run: RunConfig,
    model: Model,
    *,
    out: str | Path | None = None,
    trained_on: Sequence[Example] | None = None,
    console: bool = True,
) -> dict[str, Any]:
    """Score a base or fused model on `run.data.task` (one task), as `run.eval` says.

    out: a path without suffix: <out>.json gets the result, <out>.jsonl one line per example with
    its prompt, output, parsed answers and scores, and <out>.*.partial.jsonl, while it runs, what a
    stopped evaluation goes on from. trained_on: the training examples; a test question that is one
    of theirs (normalised text) is marked, and every score is given on all rows and on the clean
    ones.

    Returns task, split, rows, with trained_on clean_rows, loss, accuracy and the other scores
    (evals.SCORES) as numbers, and `scores`: rows ("all", "clean") -> score -> mean, low, high (95%,
    bootstrap). The loss is over rows that fit data.bucket_lengths, documents cut to them; answers
    are generated from prompts as long as the context allows (eval.max_prompt_tokens).
    """
    result, _, partials = _evaluate(
        run, model, out, None if trained_on is None else questions(trained_on), console
    )
    _remove(partials)
    return result


def _evaluate(
    run: RunConfig, model: Model, out: str | Path | None, seen: frozenset[str] | None, console: bool
) -> tuple[dict[str, Any], list[Record], list[Path]]:
    """The result, the records, and the files of finished batches, for the caller to remove when all
    that it evaluates is done.
    """
    out = None if out is None else local_path(out, "out")
    started, env, evaluation, run = time.perf_counter(), environment(), run.eval, dated(run)
    require_fit(run, model)
    require_local(model.params, "evaluate")
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
    marks = [False] * len(mixture) if seen is None else contaminated(mixture, seen)
    kept = [i for i, mark in enumerate(marks) if not (mark and evaluation.clean_only)][
        : evaluation.limit
    ]
    require(
        bool(kept),
        f"{name}: every question of its {evaluation.split} split is in the training data, so"
        " eval.clean_only=True leaves none.",
    )
    examples = [mixture[i] for i in kept]
    result: dict[str, Any] = {"task": name, "split": evaluation.split, "rows": len(examples)}
    result |= {key: getattr(model.config.execution, key) for key in ("dtype", "matmul_precision")}
    records: list[Record] = [
        {"index": i, "prompt": e.prompt, "input": e.input, "answer": e.answer or e.target}
        for i, e in zip(kept, examples, strict=True)
    ]
    if seen is not None:
        records = [record | {"contaminated": marks[record["index"]]} for record in records]
        result |= {
            "questions": len(marks),
            "contaminated": sum(marks),
            "clean_rows": [record["contaminated"] for record in records].count(False),
        }
        if any(marks):
            text = "%s: %d of %d questions are in the training data; " + (
                "they are left out"
                if evaluation.clean_only
                else "scores are given on all rows and on the clean ones"
            )
            log.warning(text, name, sum(marks), len(marks))
    if evaluation.loss:
        encoded = tokenize_examples(examples, model.tokenizer, run.data, model.config.vocab_size)
        loss = held_out_loss(
            model,
            encoded,
            run.data,
            batch_size=run.data.batch_size // run.data.grad_accum_steps,
            chunk=run.train.loss_chunk,
        )
        result |= {
            "loss": loss["loss"],
            "loss_rows": int(loss["rows"]),
            "loss_documents_cut": encoded.truncated,
        }
    partials = {
        kind: None if out is None else Path(f"{out}.{kind}.partial.jsonl")
        for kind in ("likelihood", "generation")
    }
    if evaluation.likelihood and all(e.options for e in examples):
        with progress_bar(len(examples), f"{name}: likelihoods", console) as advance:
            fresh = likelihood_records(
                model,
                examples,
                run.data,
                evaluation,
                partial=partials["likelihood"],
                on_batch=advance,
            )
        records = [record | new for record, new in zip(records, fresh, strict=True)]
    if evaluation.generate:
        with progress_bar(len(examples), f"{name}: generating answers", console) as advance:
            fresh = generation_records(
                model,
                name,
                examples,
                run.data,
                evaluation,
                partial=partials["generation"],
                on_batch=advance,
            )
        records = [record | new for record, new in zip(records, fresh, strict=True)]
        result |= (
            {"documents_cut": sum(record["document_cut"] for record in records)}
            if "document_cut" in records[0]
            else {}
        )
        result["answers_cut"] = sum(record["cut"] for record in records)
        compared = sum("correct" in record for record in records)
        result |= {"rows_with_answer": compared} if 0 < compared < len(records) else {}
    if all(example.options for example in examples):
        result["chance"] = sum(1 / len(example.options) for example in examples) / len(examples)
    scores = {} if evaluation.clean_only else {"all": scores_of(records, evaluation.seed)}
    if seen is not None:
        scores["clean"] = scores_of([r for r in records if not r["contaminated"]], evaluation.seed)
    result |= {
        score: values["mean"]
        for score, values in scores.get("all", scores.get("clean", {})).items()
    }
    result |= {
        f"{score}_clean": values["mean"] for score, values in scores.get("clean", {}).items()
    }
    result |= {
        "prompt_style": evaluation.prompt_style or run.data.prompt_style,
        "scores": scores,
        "seconds": time.perf_counter() - started,
    }
    if out is not None:
        atomic_write(
            f"{out}.jsonl",
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode(),
        )
        write_json(f"{out}.json", result | {"config": to_dict(run), "environment": env})
    return result, records, [partial for partial in partials.values() if partial is not None]


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def check_tasks(run: RunConfig, tasks: Sequence[str]) -> None:
    """ConfigError for a task that does not exist or whose files are not there: to be said before
    anything slow.
    """
    for task in tasks:
        get_task(task)
        load_mixture(dataclasses.replace(run.data, task=task), run.eval.split, 1)


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
) -> dict[str, Any]:
    """`evaluate` on each of `tasks`, then <out>/summary-<split>-<label>.json and .md: a row per
    task, and the mean over the tasks of each group.

    trained_on: where test questions are looked for, as `evaluate` does with rows; what a run of
    this project trained on never includes the split that it held out for the task itself.

    Task files are <out>/<task>-<split>-<label>.json and .jsonl. Preempted, it goes on where it was,
    whichever task that is. Returns what the summary's JSON holds. ConfigError where `out` holds a
    summary of that name of another model or of other settings, unless it is to be replaced.
    """
    out, env, run = local_path(out, "out"), environment(), dated(run)
    check_tasks(run, tasks)
    path = out / f"summary-{run.eval.split}-{label}"
    origin = {"model": fingerprint(model), "data.prompt_style": run.data.prompt_style}
    origin |= {
        f"eval.{key}": value
        for key, value in to_dict(run.eval).items()
        if key not in ("batch_size", "limit", "seed")
    }
    if not replace:
        _refuse_other(Path(f"{path}.json"), origin)
    if trained_on is None:
        log.warning(
            "no training data was named, so no test question is checked against any; see"
            " --trained-on"
        )
    sources = [
        ((name, split) if given.here else None, questions(rows))
        for given in trained_on or ()
        for name, split, rows in source_splits(given.data)
    ]
    results, tables, partials = [], {}, list[Path]()
    for task in tasks:
        one = dataclasses.replace(run, data=dataclasses.replace(run.data, task=task))
        seen = (
            None
            if trained_on is None
            else frozenset[str]().union(
                *(found for own, found in sources if own != (task, run.eval.split))
            )
        )
        result, tables[task], files = _evaluate(
            one, model, out / f"{task}-{run.eval.split}-{label}", seen, console
        )
        results.append(result)
        partials += files
    groups = {}
    for group, members in GROUPS.items():
        present = [task for task in tasks if task in members]
        if len(present) > 1:
            rows = {} if run.eval.clean_only else {"all": [tables[task] for task in present]}
            if trained_on is not None:
                rows["clean"] = [
                    [r for r in tables[task] if not r["contaminated"]] for task in present
                ]
            groups[group] = {"tasks": present} | {
                name: group_scores(table, run.eval.seed) for name, table in rows.items()
            }
    summary = {
        "label": label,
        "tasks": results,
        "groups": groups,
        "origin": origin,
        "config": to_dict(run),
        "environment": env,
    }
    write_json(f"{path}.json", summary)
    atomic_write(f"{path}.md", summary_page(summary).encode())
    _remove(partials)
    return summary


def _refuse_other(path: Path, origin: dict[str, Any]) -> None:
    if path.is_file():
        # Of settings that are younger than the file.
        defaults = {f"eval.{key}": value for key, value in to_dict(EvalConfig()).items()}
        there = defaults | json.loads(path.read_text(encoding="utf-8")).get("origin", {})
        other = [
            key for key, value in json.loads(json.dumps(origin)).items() if there.get(key) != value
        ]
        require(
            not other,
            f"{path} holds scores of other settings ({', '.join(other)}); give another --out, or"
            " move them away.",
        )


SCORE_LEGEND = (
    "accuracy: the generated answer by this project's parser; accuracy_legacy: by LLM-Adapters'"
    " rules; likelihood_sum, likelihood_norm: the likeliest option by the sum of its tokens'"
    " log-probabilities, or by that sum over its characters. An option is a whole answer with its"
    ' label ("the correct answer is answer2"): the options of a question are equally long, and'
    " the two scores equal, but for boolq's true and false. Neither is lm-evaluation-harness' acc"
    " or acc_norm, whose options are the texts of the answers. clean: rows whose question is not in"
    " the training data."
)


def decoding(evaluation: Mapping[str, Any]) -> str:
    """How answers are generated, in words, from the settings of EvalConfig."""
    how = (
        "greedy"
        if evaluation["num_beams"] == 1
        else f"beam search with {evaluation['num_beams']} beams"
    )
    return f"{how}, at most {evaluation['max_new_tokens']} new tokens"


def summary_page(summary: dict[str, Any]) -> str:
    """Markdown: one line per task and rows (all, clean), then per group, each score with its 95%
    interval.
    """
    env, evaluation = summary["environment"], summary["config"]["eval"]
    lines = [
        {"task": r["task"], "on": kind, "rows": r["rows"] if kind == "all" else r["clean_rows"]}
        | {"loss": r.get("loss") if kind == next(iter(r["scores"])) else None}
        | {name: _interval(values) for name, values in scores.items()}
        for r in summary["tasks"]
        for kind, scores in r["scores"].items()
    ]
    lines += [
        {"task": f"mean of {len(group['tasks'])} {name}", "on": kind}
        | {score: _interval(values) for score, values in group[kind].items()}
        for name, group in summary["groups"].items()
        for kind in ("all", "clean")
        if kind in group
    ]
    return "\n".join(
        [
            f"# {summary['label']}",
            "",
            (
                f"Split {evaluation['split']}; prompt style {summary['tasks'][0]['prompt_style']};"
                f" {decoding(evaluation)}. Scores with their 95% interval (bootstrap over rows)."
                f" {SCORE_LEGEND}"
            ),
            "",
            markdown_table(lines, list(dict.fromkeys(key for line in lines for key in line))),
            "",
            *_remarks(summary["tasks"]),
            (
                f"Command: `{env['command']}`; commit"
                f" {env['commit']}{' (with local changes)' if env['dirty'] else ''}; device"
                f" {env['device']}; jax {env['jax']}; seed {evaluation['seed']}; {env['date']}."
            ),
            "",
        ]
    )


def _remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the scores has to know beside them: contamination, answers cut short,
    chance.
    """
    marked = {
        r["task"]: f"{r['contaminated']} of {r['questions']}"
        for r in results
        if "contaminated" in r
    }
    cut = {r["task"]: f"{r['answers_cut']} of {r['rows']}" for r in results if "answers_cut" in r}
    chance = {r["task"]: f"{r['chance']:.3f}" for r in results if "chance" in r}
    fewer = {
        r["task"]: f"{r['loss_rows']} of {r['rows']}"
        for r in results
        if r.get("loss_rows", r["rows"]) != r["rows"]
    }
    documents = {
        r["task"]: f"{r['documents_cut']} of {r['rows']}" for r in results if r.get("documents_cut")
    }
    texts = {
        "Test questions found in the training data": marked,
        "Answers that reached the limit of new tokens": cut,
        "Chance": chance,
    }
    compared = {
        r["task"]: f"{r['rows_with_answer']} of {r['rows']}"
        for r in results
        if "rows_with_answer" in r
    }
    texts |= {"Rows with an answer, which accuracies are over": compared}
    texts |= {
        "Rows that the loss is over, the others being longer than data.bucket_lengths": fewer,
        "Documents cut to fit the prompt": documents,
    }
    lines = [
        f"{text}: {', '.join(f'{task} {value}' for task, value in found.items())}."
        for text, found in texts.items()
        if found
    ]
    return [
        *([] if marked else ["No training data was named: contamination was not checked."]),
        *lines,
        "",
    ]


def _interval(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
