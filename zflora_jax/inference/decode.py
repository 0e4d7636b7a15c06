"""Generation of token ids: batches of prompts, and one prompt token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, gathered
from zflora_jax.inference.batching import (
    Batch,
    batches,
    check_prompts,
    pad_left,
    padded_length,
    power_of_two,
)
from zflora_jax.inference.beam import BeamProgram
from zflora_jax.inference.generation_config import (
    GenerationConfig,
    GenerationSettings,
    generation_config,
)
from zflora_jax.inference.model_call import packed
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.inference.sampling import GREEDY
from zflora_jax.inference.unfused import UnfusedAdapters, unfused_adapters
from zflora_jax.ops.sampling import NON_FINITE
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use

Array = jax.Array


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    tasks: Sequence[int] | None = None,
    request_ids: Sequence[int] | None = None,
    on_answer: Callable[[int, list[int]], None] | None = None,
    **settings: Unpack[GenerationSettings],
) -> list[list[int]]:
    """Generate token ids for each prompt.

    Prompts of similar length share a batch; an answer does not depend on the prompts beside it (up
    to float rounding of the matrix products). Processes that share a model call this together, with
    the same arguments, and all get the answers.

    Args:
      model: base, fused or packed.
      prompts: token ids of each prompt.
      config: how to generate; None for the defaults of `GenerationConfig`.
      adapter, adapters: config and tree of an adapter to run beside the base instead of fused into
        it, which is slower.
      tasks: index of the task that each prompt is of; `adapters` are then those of all tasks,
        leaves [N, ...] (`stack_tasks`), and a batch may mix tasks.
      request_ids: what is drawn for a prompt depends on the seed and on its id; None: 0, 1, ...
      on_answer: called with the number and the answer of each prompt as soon as its batch is done.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Returns:
      The ids generated for each prompt, in the order of `prompts`, the stop token included where
      the model ended by itself.

    Raises:
      ConfigError: settings that do not go together; a prompt that is empty, does not fit the
        context, or holds ids that the model has no embedding for.
      NonFiniteError: logits are NaN or infinite.
    """
    config = checked(model, generation_config(config, settings))
    _check_requests(len(prompts), config, request_ids, tasks)
    check_prompts(model, prompts, config.max_new_tokens)
    unfused = unfused_adapters(adapter, adapters, tasks, len(prompts))
    run = packed(model, None if unfused is None else unfused.config)
    unfused = unfused and unfused.placed(run)
    answers: list[list[int]] = [[] for _ in prompts]
    for rows, found in answered(run, prompts, config, request_ids, unfused):
        for i, answer in zip(rows, found, strict=True):
            answers[i] = answer
            if on_answer:
                on_answer(i, answer)
    return answers


def answered(
    run: Model,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    request_ids: Sequence[int] | None = None,
    unfused: UnfusedAdapters | None = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(the numbers of its prompts, their answers) of each batch, as soon as it is done. Arguments
    are those of `generate_tokens`, checked and placed.
    """
    for batch in batches([len(prompt) for prompt in prompts], config.batch_size):
        ids = batch.rows if request_ids is None else [request_ids[i] for i in batch.rows]
        out = _generate_batch(run, unfused, config, [prompts[i] for i in batch.rows], batch, ids)
        found = []
        for i, row in zip(batch.rows, out, strict=False):  # the rest are fillers
            _check_finite(
                row, f"prompt {i}" if request_ids is None else f"request {request_ids[i]}"
            )
            found.append([int(token) for token in row if token >= 0])
        yield batch.rows, found


def _generate_batch(
    run: Model,
    unfused: UnfusedAdapters | None,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    batch: Batch,
    request_ids: Sequence[int],
) -> np.ndarray:
    """Generate for the prompts of one batch, the last of them the longest.

    Returns:
      Tokens [rows, max_new_tokens] int32, ENDED after the end of a row; fillers after the prompts.
    """
    size = fill_rows(batch.size, run.params)
    tokens, valid = pad_left(prompts, size, padded_length(len(prompts[-1])))
    variables, adapter, stop = {"params": run.params}, None, config.stop_token_ids or ()
    if unfused:
        variables, adapter = variables | unfused.variables(run, batch, size), unfused.config
    if config.num_beams > 1:
        beams = BeamProgram(run.config, adapter, config.num_beams, stop)
        with mesh_in_use(run.params):
            return gathered(beams.search(variables, tokens, valid, config.max_new_tokens))
    program = DecodeProgram(run.config, adapter, config.sampler or GREEDY, stop)
    keys = _row_keys(config.seed, request_ids, size)
    with mesh_in_use(run.params):
        return gathered(program.decode(variables, tokens, valid, keys, config.max_new_tokens))


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    config: GenerationConfig | None = None,
    **settings: Unpack[GenerationSettings],
) -> Iterator[int]:
    """Generate for one prompt, token by token: a compiled step for each, called from here.

    Processes that share the model each take all tokens.

    Args:
      model, config, settings: as for `generate_tokens`; batch_size does not matter.
      prompt: token ids.

    Yields:
      What `generate_tokens(model, [prompt], config)` gives, as it comes.

    Raises:
      ConfigError: as for `generate_tokens`, and for num_beams above 1.
      NonFiniteError: as for `generate_tokens`.
    """
    config = checked(model, generation_config(config, settings))
    require(config.num_beams == 1, "a beam search cannot be streamed: set num_beams=1.")
    check_prompts(model, [prompt], config.max_new_tokens)
    run = packed(model)
    stop = config.stop_token_ids or ()
    program = DecodeProgram(run.config, None, config.sampler or GREEDY, stop)
    tokens, valid = pad_left([prompt], 1, padded_length(len(prompt)))
    keys, variables = _row_keys(config.seed, [0], 1), {"params": run.params}
    # A power of two, so that conversations that grow share their compiled steps.
    room = power_of_two(config.max_new_tokens)
    with mesh_in_use(run.params):
        state = program.prefill(variables, tokens, valid, keys, room)
    for count in range(1, config.max_new_tokens + 1):
        token, done = int(gathered(state.last)[0]), bool(gathered(state.done)[0])
        _check_finite([token], "the prompt")
        yield token
        if count == config.max_new_tokens or done:
            return
        with mesh_in_use(run.params):
            state = program.decode_until(variables, state, keys, np.int32(count + 1))


def checked(model: Model, config: GenerationConfig) -> GenerationConfig:
    """`config` with the model's stop tokens where it names none; those that it names must exist.
    And no more beams than tokens that do not stop.
    """
    if config.stop_token_ids:
        stop = "stop_token_ids"
        check_ids(config.stop_token_ids, model.config.vocab_size, stop, model.tokenizer)
    config = config.stopping_at(model.config.eos_token_ids)
    room = model.config.vocab_size - len(config.stop_token_ids or ())
    require(
        config.num_beams == 1 or config.num_beams <= room,
        f"num_beams={config.num_beams}: must be at most {room}, the vocabulary's tokens that do not"
        " stop.",
    )
    return config


def _check_requests(
    count: int,
    config: GenerationConfig,
    request_ids: Sequence[int] | None,
    tasks: Sequence[int] | None,
) -> None:
    require(
        tasks is None or config.num_beams == 1,
        "beam search does not mix tasks in a batch: give the prompts of each task apart, without"
        " tasks.",
    )
    require(
        request_ids is None
        or (len(request_ids) == count and all(0 <= i < 2**32 for i in request_ids)),
        f"request_ids={request_ids!r:.60}: must be {count} numbers from 0 to 2**32 - 1, one"
        " for each prompt.",
    )


def _check_finite(row: Sequence[int] | np.ndarray, of: str) -> None:
    if NON_FINITE in row:
        raise NonFiniteError(
            f"the logits of {of} are NaN or infinite: the model is damaged, was trained"
            " with too high a learning rate, or needs float32 instead of a narrower dtype."
        )


def _row_keys(seed: int, request_ids: Sequence[int], rows: int) -> Array:
    """A random key [rows] for each row; fillers repeat those of other rows."""
    ids = jnp.asarray(np.resize(np.asarray(request_ids, np.uint32), rows))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
