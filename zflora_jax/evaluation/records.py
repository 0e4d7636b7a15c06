"""Records of generated answers and of option log-likelihoods: one per example, resumable.

Processes that share a model call these functions together; process 0 alone reads and writes files.
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

from zflora_jax.core.errors import NonFiniteError
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
from zflora_jax.reporting.files import atomic_write

log = logging.getLogger(__name__)

Record = dict[str, Any]
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


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
      data: Prompt style and date, where `evaluation` names none.
      evaluation: max_new_tokens, batch_size, prompt style.
      partial: A file that finished batches are added to; a call with the same model, prompts and
        settings resumes from it.
      on_batch: Called with the number of rows of each finished batch.

    Returns:
      One record per example, in their order: output, new_tokens, cut (whether max_new_tokens ended
      it); prediction and correct where the example has an answer; ROUGE F-measures where it has
      references; document_cut where it has a document (True: cut to fit the prompt).
    """
    task, style = get_task(task_name), evaluation.prompt_style or data.prompt_style
    prompts, cut = _prompts(model, examples, style, evaluation, data.date, room=True)
    stop = stop_ids(model, style)

    def answer(rows: list[int]) -> list[Record]:
        outputs = generate_tokens(
            model,
            [prompts[i] for i in rows],
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            stop_token_ids=stop,
        )
        return [_answer(model, ids, stop) for ids in outputs]

    key = ("generation, cut", stop, evaluation.max_new_tokens)
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
        record |= _judged(task, text, example)
    return records


def _answer(model: Model, ids: Sequence[int], stop: Sequence[int]) -> Record:
    return {
        "output": answer_text(model.tokenizer, ids, stop),
        "new_tokens": len(ids),
        "cut": not ids or ids[-1] not in stop,
    }


def _judged(task: Task, text: str, example: Example) -> Record:
    """Returns the ROUGE of an answer against references, and whether it is right."""
    found: Record = dict(rouge(text, example.references)) if example.references else {}
    if example.answer:
        found["prediction"] = task.parse(text)
        found["correct"] = task.score(found["prediction"], example.answer)
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
      model, data, evaluation, partial, on_batch: As for `generation_records`.
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
        _require_finite(sums)
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


def _require_finite(sums: Sequence[np.ndarray]) -> None:
    if not all(np.isfinite(row).all() for row in sums):  # argmax would pick a NaN
        raise NonFiniteError(
            "log-likelihoods are NaN or infinite: the model is damaged, or was trained with too"
            " high a learning rate."
        )


def _prompts(
    model: Model,
    examples: Sequence[Example],
    style: str,
    evaluation: EvalConfig,
    date: str | None,
    *,
    room: bool = False,
) -> tuple[list[list[int]], list[bool]]:
    """Returns the prompts' token ids, and which of them had their document cut.

    room: Whether each prompt must leave room for eval.max_new_tokens, which is checked here, since
    the longest prompts come last.
    """
    new_tokens, context = evaluation.max_new_tokens, model.config.max_position_embeddings
    require(
        not room or new_tokens < context,
        f"eval.max_new_tokens={new_tokens} leaves no room for a prompt in the model's context of"
        f" {context} tokens; lower it.",
    )
    require(
        model.tokenizer is not None,
        "this model has no tokenizer, so prompts cannot be encoded; use a model directory that has"
        " one.",
    )
    limit = evaluation.max_prompt_tokens or context - new_tokens
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
    if room:
        names = [example.where for example in examples]
        check_prompts(model, prompts, new_tokens, names, "eval.max_new_tokens")
    return prompts, cut


# Likelihoods are scored for so many batches at once: lengths differ less within a batch then.
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
    """Runs `work` on all rows, `size` rows of similar length at a time, except for those that
    `partial` holds of the same model, prompts and `key`.
    """
    with contextlib.ExitStack() as stack:
        done: dict[int, Record] = {}
        add: Callable[[dict[int, Record]], None] | None = None
        if partial is not None:
            what = repr((fingerprint(model), [list(p) for p in prompts], key))
            name = hashlib.sha256(what.encode()).hexdigest()
            there = distributed.on_main(lambda: sorted(_read_partial(partial, name).items()))
            done = dict(distributed.from_process_0(there))
            if done:
                log.info("%s: resumes after %d of %d rows", partial, len(done), len(prompts))
                on_batch(len(done))
            add = distributed.on_main(lambda: stack.enter_context(_kept(partial, name, done)))
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
def _kept(
    path: Path, name: str, done: Mapping[int, Record]
) -> Iterator[Callable[[dict[int, Record]], None]]:
    """Begins the file of an interrupted evaluation's rows anew, at a path or URL.

    Yields:
      A function that adds rows.
    """

    def text(rows: Mapping[int, Record]) -> str:
        lines = ({"index": i} | record for i, record in rows.items())
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    mirror = Mirror(path.parent)
    begin = json.dumps({"key": name}) + "\n" + text(done)
    atomic_write(mirror.path / path.name, begin.encode())
    try:
        with open(mirror.path / path.name, "a", encoding="utf-8") as file:

            def add(rows: dict[int, Record]) -> None:
                file.write(text(rows))
                file.flush()
                mirror.sync()

            yield add
    finally:
        mirror.close()


def _read_partial(path: Path, name: str) -> dict[int, Record]:
    """Reads the rows of an interrupted evaluation called `name`; none if it is another one. Leaves
    out a line that the interruption has torn.
    """
    done: dict[int, Record] = {}
    if not path.is_file():
        return done
    for number, line in enumerate(lines_of(path.read_bytes().decode("utf-8", errors="replace"))):
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
    """Returns the F-measures of ROUGE-1, -2, -L and -Lsum, each the best over `references`, by
    `rouge-score` with stemming. Lsum takes lines as sentences.
    """
    scores = _rouge_scorer().score_multi(list(references), text)
    return {name: float(scores[name].fmeasure) for name in ROUGE}


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)
