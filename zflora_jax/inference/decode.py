"""Generation of token ids: batches of prompts, and one prompt token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.tasks import rows_of
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, gathered, unstack_layers
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
    GREEDY,
    GenerationConfig,
    GenerationSettings,
    generation_config,
)
from zflora_jax.inference.program import DecodeProgram, packed
from zflora_jax.ops.sampling import ENDED, NON_FINITE
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use, place_like

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
    """Generates token ids for each prompt.

    Prompts of similar length share a batch; an answer does not depend on the other prompts of its
    batch (up to float rounding of the matrix products). Processes that share a model call this
    together with the same arguments, and each gets all answers.

    Args:
      model: A base, fused or packed model.
      prompts: Token ids of each prompt.
      config: Settings of generation; None for the defaults of `GenerationConfig`.
      adapter: Config of an adapter that runs unmerged, which is slower than a fused one.
      adapters: Parameters of that adapter.
      tasks: Index of each prompt's task. `adapters` then holds all tasks, leaves [N, ...]
        (`stack_tasks`), and a batch may mix tasks.
      request_ids: Ids that, with the seed, decide each prompt's random draws; None: 0, 1, ...
      on_answer: Called with the number and the answer of each prompt when its batch is done.
      settings: Fields of `GenerationConfig` that replace those of `config`.

    Returns:
      The token ids generated for each prompt, in the order of `prompts`, with the stop token where
      the model ended its answer.

    Raises:
      ConfigError: Settings contradict each other; a prompt is empty, does not fit the context, or
        holds ids that the model has no embedding for.
      NonFiniteError: Logits are NaN or infinite.
    """
    config = checked(model, generation_config(config, settings))
    _check_requests(len(prompts), config, request_ids)
    check_prompts(model, prompts, config.max_new_tokens)
    _check_adapters(adapter, adapters, tasks, len(prompts), config)
    run, unmerged = packed(model, adapter), None
    if adapter is not None and adapters is not None:
        tree = place_like(run.params, adapters)
        if tasks is None:
            tree = unstack_layers(tree, run.config.num_layers)
        unmerged = Unmerged(adapter, tree, tasks)
    answers: list[list[int]] = [[] for _ in prompts]
    for rows, found in answer_batches(run, prompts, config, request_ids, unmerged):
        for i, answer in zip(rows, found, strict=True):
            answers[i] = answer
            if on_answer:
                on_answer(i, answer)
    return answers


@dataclass(frozen=True, eq=False)
class Unmerged:
    """An adapter that runs unmerged.

    Attributes:
      config: The adapter's config.
      tree: Its parameters; with `tasks` every leaf has a leading axis of tasks.
      tasks: Index of each prompt's task; None where all prompts use `tree`.
    """

    config: AdapterConfig
    tree: Tree
    tasks: Sequence[int] | None

    def variables(self, run: Model, batch: Batch, size: int) -> Tree:
        """Returns the adapter's variables for the prompts of `batch`, in arrays of `size` rows."""
        if self.tasks is None:
            return {"adapters": self.tree}
        rows = rows_of(self.tree, np.resize([self.tasks[i] for i in batch.rows], size))
        return {"row_adapters": unstack_layers(rows, run.config.num_layers, axis=1)}


def answer_batches(
    run: Model,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    request_ids: Sequence[int] | None = None,
    unmerged: Unmerged | None = None,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yields (numbers of the prompts, their answers) of each batch, when it is done. Arguments are
    those of `generate_tokens`, checked and packed.
    """
    for batch in batches([len(prompt) for prompt in prompts], config.batch_size):
        ids = batch.rows if request_ids is None else [request_ids[i] for i in batch.rows]
        some = [prompts[i] for i in batch.rows]  # the last is the longest
        size = fill_rows(batch.size, run.params)
        tokens, valid = pad_left(some, size, padded_length(len(some[-1])))
        variables, adapter = {"params": run.params}, None
        if unmerged:
            variables |= unmerged.variables(run, batch, size)
            adapter = unmerged.config
        stop, new_tokens = config.stop_token_ids or (), config.max_new_tokens
        with mesh_in_use(run.params):
            if config.num_beams > 1:
                beams = BeamProgram(run.config, adapter, config.num_beams, stop)
                out = beams.search(variables, tokens, valid, new_tokens)
            else:
                program = DecodeProgram(run.config, adapter, config.sampler or GREEDY, stop)
                keys = _row_keys(config.seed, ids, size)
                out = program.decode(variables, tokens, valid, keys, new_tokens)
        found = gathered(out)[: len(some)]  # the rest are fillers
        for i, row in zip(ids, found, strict=True):
            _check_finite(row, f"{'prompt' if request_ids is None else 'request'} {i}")
        yield batch.rows, [[int(token) for token in row if token != ENDED] for row in found]


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    config: GenerationConfig | None = None,
    **settings: Unpack[GenerationSettings],
) -> Iterator[int]:
    """Generates for one prompt, token by token, with a compiled step for each.

    Processes that share the model each consume all tokens.

    Args:
      model: A base, fused or packed model.
      prompt: Token ids.
      config: Settings of generation; batch_size has no effect.
      settings: Fields of `GenerationConfig` that replace those of `config`.

    Yields:
      The tokens of `generate_tokens(model, [prompt], config)`, one at a time.

    Raises:
      ConfigError: As for `generate_tokens`, and for num_beams above 1.
      NonFiniteError: As for `generate_tokens`.
    """
    config = checked(model, generation_config(config, settings))
    require(config.num_beams == 1, "a beam search cannot be streamed: set num_beams=1.")
    check_prompts(model, [prompt], config.max_new_tokens)
    run = packed(model)
    stop = config.stop_token_ids or ()
    program = DecodeProgram(run.config, None, config.sampler or GREEDY, stop)
    tokens, valid = pad_left([prompt], 1, padded_length(len(prompt)))
    keys, variables = _row_keys(config.seed, [0], 1), {"params": run.params}
    # A power of two, so that growing conversations share their compiled steps.
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
    """Returns `config` with the model's stop tokens where it names none.

    Raises:
      ConfigError: A stop token that the vocabulary lacks, or more beams than other tokens.
    """
    stop = config.stop_token_ids
    if stop:
        check_ids(stop, model.config.vocab_size, "stop_token_ids", model.tokenizer)
    config = config.stopping_at(model.config.eos_token_ids)
    room = model.config.vocab_size - len(config.stop_token_ids or ())
    require(
        config.num_beams == 1 or config.num_beams <= room,
        f"num_beams={config.num_beams}: must be at most {room}, the number of tokens that do not"
        " stop.",
    )
    return config


def _check_requests(
    count: int, config: GenerationConfig, request_ids: Sequence[int] | None
) -> None:
    require(
        request_ids is None
        or (len(request_ids) == count and all(0 <= i < 2**32 for i in request_ids)),
        f"request_ids={request_ids!r:.60}: must be {count} integers from 0 to 2**32 - 1, one"
        " for each prompt.",
    )


def _check_adapters(
    adapter: AdapterConfig | None,
    adapters: Tree | None,
    tasks: Sequence[int] | None,
    prompts: int,
    config: GenerationConfig,
) -> None:
    require(
        (adapter is None) == (adapters is None),
        "adapter and adapters go together: give both, or neither.",
    )
    if tasks is None:
        return
    require(
        adapters is not None,
        "tasks names the adapter of each prompt: give adapter and adapters too.",
    )
    require(len(tasks) == prompts, f"{prompts} prompts and {len(tasks)} tasks: give one for each.")
    require(
        config.num_beams == 1,
        "beam search does not mix tasks in a batch: give the prompts of each task separately,"
        " without tasks.",
    )


def _check_finite(row: Sequence[int] | np.ndarray, of: str) -> None:
    if NON_FINITE in row:
        raise NonFiniteError(
            f"the logits of {of} are NaN or infinite: the model is damaged, was trained"
            " with too high a learning rate, or needs float32 instead of a narrower dtype."
        )


def _row_keys(seed: int, request_ids: Sequence[int], rows: int) -> Array:
    """Returns a random key for each row, [rows]; fillers repeat those of other rows."""
    ids = jnp.asarray(np.resize(np.asarray(request_ids, np.uint32), rows))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
