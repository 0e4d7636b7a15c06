"""Evaluation: held-out loss and generated answers, with a record of every example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, require
from zflora_jax.data.pipeline import Encoded, encode_prompts, eval_batches
from zflora_jax.data.prompts import end_token
from zflora_jax.data.tasks import Example, get_task
from zflora_jax.decode import generate_tokens
from zflora_jax.model import Model
from zflora_jax.trainer import eval_step
from zflora_jax.trees import Tree


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
    """Mean cross-entropy (nats) per target token over all rows, and the number of tokens and of rows it is over."""
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    sums = [eval_step(model.config, adapter, variables, batch, chunk) for batch in eval_batches(encoded, batch_size, data.lengths)]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    return {"loss": float(sum(losses) / sum(tokens)), "tokens": float(sum(tokens)), "rows": float(len(encoded))}


def generate_answers(
    model: Model, task_name: str, examples: Sequence[Example], data: DataConfig, evaluation: EvalConfig, on_batch: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One record per example: index, prompt, input, output (greedy), prediction, answer, correct. In the order of `examples`, whatever the "
    "batch size."""
    require(model.tokenizer is not None, "this model has no tokenizer, so prompts cannot be encoded; use a model directory that has one.")
    task, prompts = get_task(task_name), encode_prompts(examples, model.tokenizer, data.prompt_style)
    # A chat template's end of turn is not always the model's EOS; either ends an answer.
    stop = sorted({*model.config.eos_token_ids, end_token(model.tokenizer, data.prompt_style)})
    outputs = generate_tokens(
        model, prompts, max_new_tokens=evaluation.max_new_tokens, batch_size=evaluation.batch_size, stop=stop, on_batch=on_batch
    )
    records = []
    for i, (example, ids) in enumerate(zip(examples, outputs, strict=True)):
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        prediction = task.parse(text)
        row = {"index": i, "prompt": example.prompt, "input": example.input, "output": text, "prediction": prediction, "answer": example.answer}
        records.append(row | {"correct": bool(task.score(prediction, example.answer)), "new_tokens": len(ids)})
    return records


def accuracy(records: Sequence[dict[str, Any]]) -> float:
    """The share of records that are correct."""
    return sum(r["correct"] for r in records) / len(records)
