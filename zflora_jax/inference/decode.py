"""Generation of token ids for batches of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import override, require
from zflora_jax.core.model import Model
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree, gathered, unstack_layers
from zflora_jax.inference.batching import (
    batches,
    check_prompts,
    listed,
    pad_left,
    padded_length,
)
from zflora_jax.inference.generation_config import GREEDY, GenerationConfig
from zflora_jax.inference.program import DecodeProgram, packed
from zflora_jax.ops.sampling import ENDED, NON_FINITE
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use, place_like

Array = jax.Array


def generate_tokens(
    model: Model,
    prompts: Iterable[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    **settings: Any,
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
      settings: Fields of `GenerationConfig` that replace those of `config`.

    Returns:
      The token ids generated for each prompt, in the order of `prompts`, with the stop token if the
      model ended its answer.

    Raises:
      ConfigError: Settings contradict each other; a prompt is empty, does not fit the context, or
        holds ids that the model has no embedding for.
      NonFiniteError: Logits are NaN or infinite.
    """
    config, prompts = _complete(model, config, settings), listed(prompts)
    check_prompts(model, prompts, config.max_new_tokens)
    require(
        (adapter is None) == (adapters is None),
        "adapter and adapters go together: give both, or neither.",
    )
    run = packed(model, adapter)
    variables, program = _variables(run, adapters), _program(run, adapter, config)
    answers: list[list[int]] = [[] for _ in prompts]
    for batch in batches([len(prompt) for prompt in prompts], config.batch_size):
        some = [prompts[i] for i in batch.rows]  # the last is the longest
        size = fill_rows(batch.size, run.params)
        tokens, valid = pad_left(some, size, padded_length(len(some[-1])))
        with mesh_in_use(run.params):
            keys = _row_keys(config.seed, batch.rows, size)
            out = program.decode(variables, tokens, valid, keys, config.max_new_tokens)
        # Rows after those of prompts are fillers.
        for i, row in zip(batch.rows, gathered(out), strict=False):
            _check_finite(row, f"prompt {i}")
            answers[i] = [int(token) for token in row if token != ENDED]
    return answers


def _complete(
    model: Model, config: GenerationConfig | None, settings: dict[str, Any]
) -> GenerationConfig:
    """Returns `config` with `settings`, and with the model's stop tokens if it names none."""
    config = override(config or GenerationConfig(), settings)
    # The model's stop ids may lie outside its vocabulary: they stop nothing.
    check_ids(
        config.stop_token_ids or (), model.config.vocab_size, "stop_token_ids", model.tokenizer
    )
    return config.stopping_at(model.config.eos_token_ids)


def _variables(run: Model, adapters: Tree | None) -> Tree:
    if adapters is None:
        return {"params": run.params}
    placed = place_like(run.params, adapters)
    return {"params": run.params, "adapters": unstack_layers(placed, run.config.num_layers)}


def _program(run: Model, adapter: AdapterConfig | None, config: GenerationConfig) -> DecodeProgram:
    stop = config.stop_token_ids or ()
    return DecodeProgram(run.config, adapter, config.sampler or GREEDY, stop)


def _check_finite(row: Sequence[int] | np.ndarray, of: str) -> None:
    if NON_FINITE in row:
        raise NonFiniteError(
            f"the logits of {of} are NaN or infinite: the model is damaged, was trained"
            " with too high a learning rate, or needs float32 instead of a narrower dtype."
        )


def _row_keys(seed: int, prompts: Sequence[int], rows: int) -> Array:
    """Returns a random key for each row, [rows]; fillers repeat those of other rows."""
    ids = jnp.asarray(np.resize(np.asarray(prompts, np.uint32), rows))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), ids)
