"""Records of generated answers and of option log-likelihoods, one per example; resumable.

Processes that share a model call these functions together; only process 0 reads and writes files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.core.run_config import DataConfig, EvalConfig
from zflora_jax.core.storage import Mirror
from zflora_jax.core.textfile import lines_of
from zflora_jax.data.encoding import encode_options, encode_prompts, fit_documents
from zflora_jax.data.tasks import Example, Task, get_task
from zflora_jax.inference.batching import check_prompts
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods
from zflora_jax.inference.text import answer_text, stop_ids
from zflora_jax.parallel import distributed

log = logging.getLogger(__name__)

Record = dict[str, Any]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Number of batches whose likelihoods are scored at once: lengths then differ less within a batch.
_LIKELIHOOD_BATCHES = 4


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
    """Generates an answer to each example and scores it.

    Args:
      model: A base or fused model.
      task_name: The task whose rules parse and compare the answers.
      examples: Examples of that task.
      data: Settings with the date, and with the prompt style if `evaluation` has none.
      evaluation: The settings max_new_tokens, batch_size, prompt_style, max_prompt_tokens.
      partial: File for finished batches; a call with the same model, prompts and settings resumes
        from it.
      on_batch: Called with the number of rows of each finished batch.

    Returns:
      One record per example, in their order: output, new_tokens, cut (whether max_new_tokens ended
      it); prediction and correct if the example has an answer; ROUGE F-measures if it has
      references; document_cut if it has a document (True: cut to fit the prompt).
    """
    task, style = get_task(task_name), evaluation.prompt_style or data.prompt_style
    new_tokens, context = evaluation.max_new_tokens, model.config.max_position_embeddings
    require(
        new_tokens < context,
        f"eval.max_new_tokens={new_tokens} leaves no room for a prompt in the model's context of"
        f" {context} tokens; lower it.",
    )
    prompts, cut = _prompts(model, examples, style, evaluation, data.date)
    # Checked here, because batches of the longest prompts come last.
    names = [example.where for example in examples]
    check_prompts(model, prompts, new_tokens, names, "eval.max_new_tokens")
    stop = stop_ids(model, style)

    def answer(rows: list[int]) -> list[Record]:
        outputs = generate_tokens(
            model,
            [prompts[i] for i in rows],
            max_new_tokens=new_tokens,
            batch_size=evaluation.batch_size,
            stop_token_ids=stop,
        )
        return [_answer(model, ids, stop) for ids in outputs]

    key = ("generation, cut", stop, new_tokens)
    records = _in_batches(answer, model, prompts, key, evaluation.batch_size, partial, on_batch)
    for record, example, is_cut in zip(records, examples, cut, strict=True):
        if example.document:
            record["document_cut"] = is_cut
        record |= _judged(task, style, record["output"], example)
    return records


def _answer(model: Model, ids: Sequence[int], stop: Sequence[int]) -> Record:
    text = answer_text(model.tokenizer, ids, stop)
    return {"output": text, "new_tokens": len(ids), "cut": not ids or ids[-1] not in stop}


def _judged(task: Task, style: str, text: str, example: Example) -> Record:
    """Returns an answer's ROUGE against references, and whether it is right."""
    if style.startswith("alpaca"):
        # LLM-Adapters' models continue with another "### Response:", and its scripts cut there.
        text = text.partition("### Response:")[0].strip()
    found: Record = dict(rouge(text, example.references)) if example.references else {}
    if example.answer:
        found["prediction"] = task.answers.parse(text)
        found["correct"] = task.answers.score(found["prediction"], example.answer)
    return found


def likelihood_records(
    model: Model,
    examples: Sequence[Example],
    data: DataConfig,
    evaluation: EvalConfig,
    *,
    partial: Path | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Record]:
    """Scores every option of each example by its likelihood after the prompt.

    In a task's cloze form, correct_sum and correct_norm are lm-evaluation-harness's acc and
    acc_norm.

    Args:
      model, data, evaluation, partial, on_batch: Arguments of `generation_records`.
      examples: Examples with options.

    Returns:
      One record per example: log_likelihoods (nats, one per option), options, and whether the
      likeliest option is the target: correct_sum by the sum over its tokens, correct_norm by that
      sum over the option's number of characters.

    Raises:
      NonFiniteError: A likelihood is NaN or infinite.
    """
    require(
        all(example.options for example in examples),
        "likelihood needs tasks whose examples have options.",
    )
    style = evaluation.prompt_style or data.prompt_style
    begun, _ = _prompts(model, examples, style, evaluation, data.date)
    pairs = zip(examples, begun, strict=True)
    prompts, options = zip(*(encode_options(*p, model.tokenizer) for p in pairs), strict=True)

    def score(rows: list[int]) -> list[Record]:
        sums = option_log_likelihoods(
            model,
            [prompts[i] for i in rows],
            [options[i] for i in rows],
            batch_size=evaluation.batch_size,
        )
        return [{"log_likelihoods": [float(x) for x in row]} for row in sums]

    key, size = ("likelihood", options), evaluation.batch_size * _LIKELIHOOD_BATCHES
    records = _in_batches(score, model, prompts, key, size, partial, on_batch)
    for record, example in zip(records, examples, strict=True):
        record |= _chosen(record["log_likelihoods"], example)
    return records


def _chosen(log_likelihoods: Sequence[float], example: Example) -> Record:
    """Compares the likeliest option with the target, by sums and by sums over characters."""
    sums, target = np.asarray(log_likelihoods), example.options.index(example.target)
    lengths = [len(option.lstrip()) for option in example.options]  # cloze form begins with a space
    return {
        "options": list(example.options),
        "correct_sum": bool(np.argmax(sums) == target),
        "correct_norm": bool(np.argmax(sums / lengths) == target),
    }


def _prompts(
    model: Model, examples: Sequence[Example], style: str, evaluation: EvalConfig, date: str | None
) -> tuple[list[list[int]], list[bool]]:
    """Returns the prompts' token ids, and True for prompts with a cut document."""
    room = model.config.max_position_embeddings - evaluation.max_new_tokens
    limit = evaluation.max_prompt_tokens or room
    fitted = fit_documents(examples, model.tokenizer, style, limit, date)
    prompts = encode_prompts(fitted, model.tokenizer, style, date)
    cut = [a.input != b.input for a, b in zip(fitted, examples, strict=True)]
    if any(cut):
        text = "cut %d of %d documents so that prompts fit %d tokens (eval.max_prompt_tokens)"
        log.warning(text, sum(cut), len(cut), limit)
    require(
        all(len(ids) <= limit for ids, is_cut in zip(prompts, cut, strict=True) if is_cut),
        f"a prompt does not fit {limit} tokens even without its document; raise"
        " eval.max_prompt_tokens.",
    )
    return prompts, cut


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """Returns the F-measures of ROUGE-1, -2, -L and -Lsum, each the best over `references`, by
    `rouge-score` with stemming. Lsum treats lines as sentences.
    """
    scores = _rouge_scorer().score_multi(list(references), text)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


# --- batches, and the file that a stopped evaluation resumes from ---------------------------------


def _in_batches(
    work: Callable[[list[int]], list[Record]],
    model: Model,
    prompts: Sequence[Sequence[int]],
    key: Any,
    size: int,
    partial: Path | None,
    on_batch: Callable[[int], None],
) -> list[Record]:
    """Runs `work` on all rows, `size` rows of similar length at a time, except for rows that are in
    `partial` for the same model, prompts and `key`.
    """
    done: dict[int, Record] = {}
    with contextlib.ExitStack() as stack:
        add: Callable[[Mapping[int, Record]], None] | None = None
        if partial is not None:
            of = repr((fingerprint(model), [list(p) for p in prompts], key))
            name = hashlib.sha256(of.encode()).hexdigest()[:16]
            there = distributed.on_main(lambda: sorted(_read_partial(partial, name).items()))
            done = dict(distributed.from_process_0(there))
            if done:
                log.info("%s: resumes after %d of %d rows", partial, len(done), len(prompts))
                on_batch(len(done))
            add = distributed.on_main(lambda: stack.enter_context(_appending(partial, name)))
        left = [i for i in range(len(prompts)) if i not in done]
        left.sort(key=lambda i: len(prompts[i]))
        for start in range(0, len(left), size):
            rows = left[start : start + size]
            fresh = dict(zip(rows, work(rows), strict=True))
            done |= fresh
            if add is not None:
                add(fresh)
            on_batch(len(rows))
    return [done[i] for i in range(len(prompts))]


@contextlib.contextmanager
def _appending(path: Path, name: str) -> Iterator[Callable[[Mapping[int, Record]], None]]:
    """Yields a function that adds rows of an evaluation `name` to the file, at a path or URL."""

    def add(rows: Mapping[int, Record]) -> None:
        for i, record in rows.items():
            line = {"key": name, "index": i} | record
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        mirror.sync()

    mirror = Mirror(path.parent, (path.name,))
    with contextlib.closing(mirror), open(mirror.path / path.name, "a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill cut off
        yield add


def _read_partial(path: Path, name: str) -> dict[int, Record]:
    """Reads the rows of an evaluation `name`, without a line that a kill cut off."""
    done: dict[int, Record] = {}
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    for line in lines_of(text):
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row.pop("key") == name:
                done[row.pop("index")] = row
    return done
