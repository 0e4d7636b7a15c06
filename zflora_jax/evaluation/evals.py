"""Held-out loss, records of generated answers and of option log-likelihoods (resumable), and what a
table of records scores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.core.run_config import DataConfig, EvalConfig
from zflora_jax.core.textfile import lines_of
from zflora_jax.core.trees import Tree
from zflora_jax.data.answers import PARSERS
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.data.tasks import Example, get_task
from zflora_jax.data.tokenization import Encoded, encode_prompts, fit_documents
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods
from zflora_jax.inference.text import answer_text, stop_ids
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use
from zflora_jax.parallel.sharding import BATCH
from zflora_jax.reporting.files import atomic_write
from zflora_jax.training.trainer import NonFiniteError, eval_step

log = logging.getLogger(__name__)

Record = dict[str, Any]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def held_out_loss(
    model: Model,
    encoded: Encoded,
    data: DataConfig,
    *,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    batch_size: int = 8,
    chunk: int = 256,
) -> dict[str, float]:
    """Mean cross-entropy (nats) per target token over all rows, and the number of tokens and of
    rows it is over.

    Raises:
      NonFiniteError: the loss is NaN or infinite.
    """
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    batches = eval_batches(encoded, fill_rows(batch_size, model.params, BATCH), data.bucket_lengths)
    with mesh_in_use(model.params):
        sums = [eval_step(model.config, adapter, variables, batch, chunk) for batch in batches]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    loss = float(sum(losses) / sum(tokens))
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss is {loss}: the model or its adapters are damaged, or the learning"
            " rate was too high."
        )
    return {"loss": loss, "tokens": float(sum(tokens)), "rows": float(len(encoded))}


# --- records --------------------------------------------------------------------------------------


def generation_records(
    model: Model,
    task_name: str,
    examples: Sequence[Example],
    data: DataConfig,
    evaluation: EvalConfig,
    *,
    partial: Path | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Record]:
    """One record per example, in the order of `examples`, whatever the batch size: output (greedy,
    or beam search with eval.num_beams), new_tokens, cut (whether eval.max_new_tokens ended it), and
    by parser prediction and correct ("fixed"), prediction_legacy and correct_legacy, or the
    F-measures of ROUGE where the task has references; document_cut where a document did not fit the
    prompt.

    partial: a file that finished batches are added to; a call with the same model, prompts and
    settings goes on from it. ROUGE is `rouge-score`'s with stemming, the best over an example's
    references.
    """
    task, style = get_task(task_name), evaluation.prompt_style or data.prompt_style
    prompts, cut = _prompts(model, examples, style, evaluation, data.date)
    stop = stop_ids(model, style)

    def answer(rows: list[int]) -> list[Record]:
        outputs = generate_tokens(
            model,
            [prompts[i] for i in rows],
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            stop_token_ids=stop,
            num_beams=evaluation.num_beams,
        )
        return [
            {
                "output": answer_text(model.tokenizer, ids, stop),
                "new_tokens": len(ids),
                "cut": not ids or ids[-1] not in stop,
            }
            for ids in outputs
        ]

    key = ("generation, cut", stop, evaluation.max_new_tokens, evaluation.num_beams)
    records = _in_batches(answer, model, prompts, key, evaluation.batch_size, partial, on_batch)
    for record, example, is_cut in zip(records, examples, cut, strict=True):
        if example.document:
            record["document_cut"] = is_cut
        # LLM-Adapters' models go on with another "### Response:"; its scripts cut there.
        text = (
            record["output"].partition("### Response:")[0].strip()
            if style.startswith("alpaca")
            else record["output"]
        )
        if example.references:
            record |= rouge(text, example.references)
        if example.answer:
            for parser in PARSERS:
                suffix = "" if parser == "fixed" else f"_{parser}"
                prediction = task.parse_as(text, parser)
                record |= {
                    f"prediction{suffix}": prediction,
                    f"correct{suffix}": bool(task.score_as(prediction, example.answer, parser)),
                }
    return records


def likelihood_records(
    model: Model,
    examples: Sequence[Example],
    data: DataConfig,
    evaluation: EvalConfig,
    *,
    partial: Path | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Record]:
    """One record per example with options, which are whole answers that differ in their label.

    log_likelihoods (nats, one per option), and whether the likeliest option is the target:
    correct_sum by the sum, correct_norm by the sum over the option's number of characters. Labels
    are equally long in all tasks but boolq, so the two agree in all others. Neither is
    lm-evaluation-harness' acc or acc_norm, whose options are the texts of the answers.
    """
    require(
        all(example.options for example in examples),
        "likelihood needs tasks whose examples have options.",
    )
    prompts, _ = _prompts(
        model, examples, evaluation.prompt_style or data.prompt_style, evaluation, data.date
    )
    options = [
        model.tokenizer(list(example.options), add_special_tokens=False)["input_ids"]
        for example in examples
    ]

    def score(rows: list[int]) -> list[Record]:
        sums = option_log_likelihoods(
            model,
            [prompts[i] for i in rows],
            [options[i] for i in rows],
            batch_size=evaluation.batch_size,
        )
        if not all(
            np.isfinite(row).all() for row in sums
        ):  # argmax would take the NaN for the likeliest
            raise NonFiniteError(
                "log-likelihoods are NaN or infinite: the model is damaged, or was trained with too"
                " high a learning rate."
            )
        return [{"log_likelihoods": [float(x) for x in row]} for row in sums]

    records = _in_batches(
        score,
        model,
        prompts,
        ("likelihood", options),
        evaluation.batch_size * _LIKELIHOOD_BATCHES,
        partial,
        on_batch,
    )
    for record, example in zip(records, examples, strict=True):
        sums, target = np.asarray(record["log_likelihoods"]), example.options.index(example.target)
        record |= {"options": list(example.options), "correct_sum": bool(np.argmax(sums) == target)}
        record |= {
            "correct_norm": bool(
                np.argmax(sums / [len(option) for option in example.options]) == target
            )
        }
    return records


def _prompts(
    model: Model, examples: Sequence[Example], style: str, evaluation: EvalConfig, date: str | None
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of the prompts, and which of them had their document cut."""
    require(
        model.tokenizer is not None,
        "this model has no tokenizer, so prompts cannot be encoded; use a model directory that has"
        " one.",
    )
    limit = (
        evaluation.max_prompt_tokens
        or model.config.max_position_embeddings - evaluation.max_new_tokens
    )
    fitted = fit_documents(examples, model.tokenizer, style, limit, date)
    cut = [a.input != b.input for a, b in zip(fitted, examples, strict=True)]
    if any(cut):
        log.warning(
            "cut %d of %d documents so that their prompts fit %d tokens; see"
            " eval.max_prompt_tokens",
            sum(cut),
            len(cut),
            limit,
        )
    prompts = encode_prompts(fitted, model.tokenizer, style, date)
    longest = max((len(ids) for ids, is_cut in zip(prompts, cut, strict=True) if is_cut), default=0)
    require(
        longest <= limit,
        f"a prompt of {longest} tokens does not fit {limit} even without its document; raise"
        " eval.max_prompt_tokens.",
    )
    return prompts, cut


# Scored at once: likelihoods share more common prefixes, and lengths differ less within a batch
_LIKELIHOOD_BATCHES = 4


def _in_batches(
    work: Callable[[list[int]], list[Record]],
    model: Model,
    prompts: Sequence[Sequence[int]],
    key: Any,
    size: int,
    partial: Path | None,
    on_batch: Callable[[int], None],
) -> list[Record]:
    """`work` on all rows, `size` at a time, similar lengths together; what `partial` holds of the
    same model, prompts and `key` is not done again.
    """
    done: dict[int, Record] = {}
    if partial is not None:
        name = hashlib.sha256(
            repr((fingerprint(model), [list(p) for p in prompts], key)).encode()
        ).hexdigest()
        done = _read_partial(partial, name)
        if done:
            log.info(
                "%s holds %d of %d rows: going on from there", partial, len(done), len(prompts)
            )
            on_batch(len(done))
        lines = [{"key": name}, *({"index": i} | record for i, record in done.items())]
        atomic_write(
            partial, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        )
    left = sorted(
        (i for i in range(len(prompts)) if i not in done), key=lambda i: (len(prompts[i]), i)
    )
    for start in range(0, len(left), size):
        rows = left[start : start + size]
        fresh = dict(zip(rows, work(rows), strict=True))
        done |= fresh
        if partial is not None:
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"index": i} | record, ensure_ascii=False) + "\n"
                    for i, record in fresh.items()
                )
        on_batch(len(rows))
    return [done[i] for i in range(len(prompts))]


def _read_partial(path: Path, name: str) -> dict[int, Record]:
    """The rows of an interrupted evaluation called `name`; none if it is another one. A line torn
    by the interruption is left out.
    """
    done: dict[int, Record] = {}
    if not path.is_file():
        return done
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8", errors="replace"))):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if number == 0 and row.get("key") != name:
            return {}
        if "index" in row:
            done[row.pop("index")] = row
    return done


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, -2, -L and -Lsum, each the best over `references`; `rouge-score` with
    stemming. Lsum takes lines as sentences.
    """
    scores = _rouge_scorer().score_multi(list(references), text)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


# --- summaries ------------------------------------------------------------------------------------

# Key of a record -> name of the score.
SCORES = {
    "correct": "accuracy",
    "correct_legacy": "accuracy_legacy",
    "correct_sum": "likelihood_sum",
    "correct_norm": "likelihood_norm",
    **{name: name for name in ROUGE},
}
_RESAMPLES = 2000
_Z = 1.96  # standard deviations of a 95% interval


def scores_of(records: Sequence[Record], seed: int = 0) -> dict[str, dict[str, float]]:
    """Score -> mean, low and high, the 95% interval of the bootstrap over rows, for each score that
    records have, over those that have it.
    """
    return {
        SCORES[key]: _mean_and_interval([column], seed)
        for key in SCORES
        if len(column := _column(records, key))
    }


def group_scores(tables: Sequence[Sequence[Record]], seed: int = 0) -> dict[str, dict[str, float]]:
    """The mean over tasks (each counts the same) of every score that all of them have, with its
    interval by resampling within tasks.
    """
    columns = {key: [_column(table, key) for table in tables] for key in SCORES}
    return {
        SCORES[key]: _mean_and_interval(some, seed)
        for key, some in columns.items()
        if some and all(map(len, some))
    }


def _column(records: Sequence[Record], key: str) -> np.ndarray:
    return np.asarray([float(record[key]) for record in records if key in record])


def _mean_and_interval(columns: Sequence[np.ndarray], seed: int) -> dict[str, float]:
    """Mean of the columns' means; the 2.5% and 97.5% quantiles of the same over resampled columns.
    Where all rows are right or all are wrong, which no resample tells from certainty, Wilson's
    interval for that many rows.
    """
    draw = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for column in columns:
        # A resample is a multinomial draw over the distinct values.
        values, counts = np.unique(column, return_counts=True)
        means += (
            draw.multinomial(len(column), counts / len(column), _RESAMPLES)
            @ values
            / len(column)
            / len(columns)
        )
    low, high = np.quantile(means, [0.025, 0.975])
    if (
        all(np.ptp(column) == 0 and column[0] in (0.0, 1.0) for column in columns)
        and len({column[0] for column in columns}) == 1
    ):
        rows = sum(map(len, columns))
        reach = _Z**2 / (rows + _Z**2)
        low, high = (0.0, reach) if columns[0][0] == 0.0 else (1 - reach, 1.0)
    return {
        "mean": float(np.mean([column.mean() for column in columns])),
        "low": float(low),
        "high": float(high),
    }
