"""The page of a model's scores on tasks: a table, and the notes that a reader needs with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zflora_jax.evaluation.scores import Score
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table

# Score -> its meaning, and its difference from others.
_LEGENDS = {
    "accuracy": "accuracy: the generated answer by this project's parser.",
    "likelihood_sum": (
        "likelihood_sum, likelihood_norm: the likeliest option by its log-probability, or by that"
        " over its characters (acc and acc_norm of lm-evaluation-harness, in cloze form)."
    ),
    "rougeL": "rouge1, rouge2, rougeL, rougeLsum: the F-measure of the best reference.",
}


def score_legend(scores: Collection[str]) -> str:
    """Explains the scores of a page."""
    known = [text for score, text in _LEGENDS.items() if score in scores]
    return " ".join([*known, "clean: rows whose question is not in the training data."])


def summary_page(summary: Mapping[str, Any]) -> str:
    """Returns a summary as Markdown: a line per task and set of rows (all, clean), then per group
    of tasks, each score with its 95% interval.

    Args:
      summary: The result of `task.evaluate_tasks`.
    """
    evaluation = summary["config"]["eval"]
    lines = [
        {"task": r["task"], "on": kind, "rows": r["rows"] if kind == "all" else r["clean_rows"]}
        | {"loss": r.get("loss") if kind == next(iter(r["scores"])) else None}
        | _cells(scores)
        for r in summary["tasks"]
        for kind, scores in r["scores"].items()
    ]
    lines += [
        {"task": f"mean of {len(group['tasks'])} {name}", "on": kind} | _cells(group[kind])
        for name, group in summary["groups"].items()
        for kind in ("all", "clean")
        if kind in group
    ]
    head = (
        f"Split {evaluation['split']}; prompt style {summary['tasks'][0]['prompt_style']};"
        f" greedy, at most {evaluation['max_new_tokens']} new tokens. Scores with their 95%"
        " interval (bootstrap over rows; those of one dialogue are drawn together)."
        f" {score_legend({score for line in lines for score in line})}"
    )
    if summary["config"].get("train", {}).get("loss") == "dpo":
        head += " No loss: train.loss=dpo compares unmerged adapters with their base (report.json)."
    table = markdown_table(lines, list(dict.fromkeys(key for line in lines for key in line)))
    last = f"{origin_line(summary['environment'])} Seed {evaluation['seed']}."
    title = f"# {summary['label']}"
    return "\n".join([title, "", head, "", table, "", *_remarks(summary["tasks"]), last, ""])


def _cells(scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    return {name: str(Score(**values)) for name, values in scores.items()}


def _remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns lines about contamination, answers cut short, chance, and rows without a score."""

    def of(part: str, whole: str = "rows", among: Any = results) -> dict[str, str]:
        return {r["task"]: f"{r[part]} of {r[whole]}" for r in among if part in r}

    marked = of("contaminated", "questions")
    fewer = [r for r in results if r.get("loss_rows") != r["rows"]]
    cut = [r for r in results if r.get("documents_cut")]
    texts = {
        "Test questions found in the training data": marked,
        "Answers that reached the limit of new tokens": of("answers_cut"),
        "Chance": {r["task"]: f"{r['chance']:.3f}" for r in results if "chance" in r},
        "Rows with an answer, which accuracies are over": of("rows_with_answer"),
        "Rows with options, which likelihoods and chance are over": of("rows_with_options"),
        "Rows that fit data.bucket_lengths, which the loss is over": of("loss_rows", among=fewer),
        "Documents cut to fit the prompt": of("documents_cut", among=cut),
    }
    unchecked = [] if marked else ["No training data was named: contamination was not checked."]
    lines = [
        f"{text}: {', '.join(f'{task} {value}' for task, value in found.items())}."
        for text, found in texts.items()
        if found
    ]
    return [*unchecked, *lines, ""]
