"""Text in, text out: held-out loss, generated answers with a record of every example, and plain generation from prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig
from zflora_jax.data.pipeline import Encoded, encode_prompts, eval_batches
from zflora_jax.data.prompts import encode_prompt_texts, end_token, render
from zflora_jax.data.tasks import Example, get_task
from zflora_jax.decode import Sampler, generate_tokens
from zflora_jax.fields import require
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
    task, prompts, stop = get_task(task_name), encode_prompts(examples, model.tokenizer, data.prompt_style), _stop(model, data.prompt_style)
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


def _stop(model: Model, prompt_style: str) -> list[int]:
    """The ids that end an answer: a chat template's end of turn is not always the model's EOS, so either does."""
    return sorted({*model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)})


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 16,
    chat: bool = False,
) -> list[str]:
    """Texts generated for text prompts, special tokens left out. Greedy unless a Sampler is given.

    chat: wrap each prompt as a user turn in the tokenizer's chat template, as training with data.prompt_style="chat" does; without it a prompt is
    continued as it is. Raises ConfigError for a model without a tokenizer, or chat without a chat template.
    """
    tokenizer: Any = model.tokenizer
    require(tokenizer is not None, "this model has no tokenizer; use generate_tokens with token ids.")
    require(not isinstance(prompts, str), "prompts is one string; pass a list of strings.")
    texts = [render(tokenizer, "chat", prompt) for prompt in prompts] if chat else list(prompts)
    answers = generate_tokens(
        model,
        encode_prompt_texts(tokenizer, texts),
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        stop=_stop(model, "chat") if chat else None,
    )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
