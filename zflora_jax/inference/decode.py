"""Generation: prefill and the token loop in one compiled function, for any Llama tree; batches with
left padding.

A row's result does not depend on the rows beside it: padding is never attended to and takes no
position, and each row draws from its own random stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.adapters.tasks import rows_of
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.token_ids import check_ids
from zflora_jax.core.trees import Tree
from zflora_jax.inference.beam import beam_decode, next_logits
from zflora_jax.inference.sampling import Sampler
from zflora_jax.nn.kv_cache import KVCache, cache_slots, init_cache
from zflora_jax.ops.precision import at_config_precision
from zflora_jax.parallel.mesh import beside, fill_rows, mesh_in_use, require_local

Array = jax.Array
# A prompt is padded to one of these: few compilations.
PROMPT_LENGTHS = (
    16,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
)


@flax.struct.dataclass
class DecodeState:
    """The loop's carry. out [B, N] int32, pad after a row's end; last [B] int32, the token to feed
    next; done [B] bool; step int32: tokens written so far.
    """

    out: Array
    last: Array
    done: Array
    step: Array
    cache: KVCache


@jax.jit(static_argnums=(0, 1, 2, 3, 4))
def decode(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    sampler: Sampler,
    max_new_tokens: int,
    stop: tuple[int, ...],
    variables: Tree,
    tokens: Array,
    valid: Array,
    keys: Array,
) -> Array:
    """Prompts [B, T] int32, left-padded, -> generated tokens [B, max_new_tokens] int32, ending with
    the stop token where one was drawn, then -1.

    valid [B, T] bool: False at padding; a row that is all padding (a filler) yields nothing. stop:
    token ids that end a row. keys [B]: one random key per row.
    """
    state = prefill(config, adapter, sampler, max_new_tokens, stop, variables, tokens, valid, keys)
    return decode_until(config, adapter, sampler, stop, variables, state, keys, max_new_tokens).out


@jax.jit(static_argnums=(0, 1, 2, 3, 4))
@at_config_precision
def prefill(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    sampler: Sampler,
    max_new_tokens: int,
    stop: tuple[int, ...],
    variables: Tree,
    tokens: Array,
    valid: Array,
    keys: Array,
) -> DecodeState:
    """The first part of `decode`: the state after the first token, with room for max_new_tokens."""
    batch, length = tokens.shape
    cache = init_cache(config, batch, cache_slots(length + max_new_tokens), adapter)
    logits, cache = next_logits(config, adapter, variables, tokens, valid, cache)
    first, done = _choose(
        sampler, stop, logits, keys, jnp.zeros((), jnp.int32), ~jnp.any(valid, axis=1)
    )
    out = jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first)
    return DecodeState(out, first, done, jnp.ones((), jnp.int32), cache)


@jax.jit(static_argnums=(0, 1, 2, 3), donate_argnums=5)
@at_config_precision
def decode_until(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    sampler: Sampler,
    stop: tuple[int, ...],
    variables: Tree,
    state: DecodeState,
    keys: Array,
    until: ArrayLike,
) -> DecodeState:
    """The rest of `decode`: on to `until` tokens (int32), or to where all rows have ended. `state`
    is donated.
    """

    def going(s: DecodeState) -> Array:
        return (s.step < until) & ~jnp.all(s.done)

    def one_token(s: DecodeState) -> DecodeState:
        logits, cache = next_logits(
            config, adapter, variables, jnp.maximum(s.last, 0)[:, None], None, s.cache
        )
        token, done = _choose(sampler, stop, logits, keys, s.step, s.done)
        return DecodeState(
            jax.lax.dynamic_update_index_in_dim(s.out, token, s.step, axis=1),
            token,
            done,
            s.step + 1,
            cache,
        )

    last = jax.lax.while_loop(
        going, one_token, replace(state, cache=state.cache.without_single_axes())
    )
    return replace(last, cache=last.cache.with_axes_of(state.cache))


def _choose(
    sampler: Sampler, stop: tuple[int, ...], logits: Array, keys: Array, step: Array, done: Array
) -> tuple[Array, Array]:
    """(the token that each row goes on with, -1 where it has ended; whether it has ended now)."""
    drawn = sampler(logits, jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step))
    ended = done | jnp.isin(drawn, jnp.asarray(stop, jnp.int32)) if stop else done
    return jnp.where(done, -1, drawn), ended


_packed: weakref.WeakKeyDictionary[Model, tuple[Tree, Model]] = weakref.WeakKeyDictionary()


def packed(model: Model) -> Model:
    """`model` packed for decode; kept as long as `model` lives, so that repeated calls do not pack
    again.
    """
    if model not in _packed or _packed[model][0] is not model.params:
        made = pack_for_decode(model)
        if made is model:
            return model
        _packed[model] = model.params, made
    return _packed[model][1]


def padded_length(length: int) -> int:
    """The smallest of PROMPT_LENGTHS that holds `length` (a multiple of 2048 beyond the last)."""
    return next((n for n in PROMPT_LENGTHS if n >= length), -(-length // 2048) * 2048)


def generate_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 16,
    stop: Sequence[int] | None = None,
    num_beams: int = 1,
    on_batch: Callable[[int], None] | None = None,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    tasks: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids generated for each prompt, the stop token included where the model ended by itself.

    stop: ids that end a row; None means the config's eos_token_ids. Prompts of similar length share
    a batch; the answers come back in the order of `prompts` and do not depend on batch_size (up to
    float rounding of the matrix products). on_batch(n) is called after each batch with its number
    of prompts. num_beams: above 1, beam search (see `beam`), which draws nothing and so takes no
    sampler of a temperature above 0; a batch then decodes batch_size * num_beams rows. adapter,
    adapters: run with these beside the base instead of fused into it, which is slower. tasks: which
    of several tasks each prompt is of; adapters are then those of all tasks, leaves [N, ...]
    (`adapters.tasks.stack_tasks`), and a batch may mix them. numbers: of the prompts, on which what
    is drawn for each hangs beside `seed`; None: from 0. Raises ValueError for an empty prompt or
    one that does not fit the context.
    """
    require(batch_size >= 1, f"batch_size={batch_size}: must be at least 1.")
    sampler, stop = (
        sampler or Sampler(),
        tuple(model.config.eos_token_ids if stop is None else stop),
    )
    require(num_beams >= 1, f"num_beams={num_beams}: must be at least 1 (1 is no beam search).")
    require(
        num_beams == 1 or sampler.temperature == 0,
        f"num_beams={num_beams} with a sampler of temperature {sampler.temperature}: beam search"
        " draws nothing. Leave the sampler out, or set num_beams=1.",
    )
    room = model.config.vocab_size - len(stop)
    require(
        num_beams == 1 or num_beams <= room,
        f"num_beams={num_beams}: must be at most {room}, the vocabulary's tokens that do not stop.",
    )
    check_prompts(model, prompts, max_new_tokens)
    require(
        (adapter is None) == (adapters is None),
        "adapter and adapters go together: give both, or neither.",
    )
    require(
        tasks is None or adapters is not None,
        "tasks says whose adapters a prompt uses: give adapter and adapters too.",
    )
    require(
        tasks is None or len(tasks) == len(prompts),
        f"{len(prompts)} prompts and {0 if tasks is None else len(tasks)} tasks: give one for"
        " each.",
    )
    require(
        tasks is None or num_beams == 1,
        "beam search does not mix tasks in a batch: give the prompts of each task apart, without"
        " tasks.",
    )
    require_local(model.params, "generate")
    run, root = packed(model), jax.random.key(seed)
    variables = {"params": run.params}
    adapters = None if adapters is None else beside(run.params, adapters)
    if adapters is not None and tasks is None:
        variables["adapters"] = trees.unstack_layers(adapters, run.config.num_layers)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        length = padded_length(len(prompts[rows[-1]]))
        tokens = np.zeros(
            (fill_rows(batch_size if len(order) > batch_size else len(rows), run.params), length),
            np.int32,
        )
        valid = np.zeros(tokens.shape, bool)
        for row, i in enumerate(rows):
            tokens[row, length - len(prompts[i]) :], valid[row, length - len(prompts[i]) :] = (
                prompts[i],
                True,
            )
        if adapters is not None and tasks is not None:
            own = rows_of(adapters, np.resize([tasks[i] for i in rows], len(tokens)))
            variables["row_adapters"] = trees.unstack_layers(own, run.config.num_layers, axis=1)
        if num_beams > 1:
            with mesh_in_use(run.params):
                out = np.asarray(
                    beam_decode(
                        run.config,
                        adapter,
                        num_beams,
                        max_new_tokens,
                        stop,
                        variables,
                        tokens,
                        valid,
                    )
                )
        else:
            drawn_by = rows if numbers is None else [numbers[i] for i in rows]
            indices = jnp.asarray(np.resize(np.asarray(drawn_by, np.uint32), len(tokens)))
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(root, indices)
            with mesh_in_use(run.params):
                out = np.asarray(
                    decode(
                        run.config,
                        adapter,
                        sampler,
                        max_new_tokens,
                        stop,
                        variables,
                        tokens,
                        valid,
                        keys,
                    )
                )
        for row, i in enumerate(rows):
            answers[i] = [int(t) for t in out[row] if t >= 0]
        if on_batch:
            on_batch(len(rows))
    return answers


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens}: must be at least 1.")
    no_ids = any(isinstance(prompt, str) or not hasattr(prompt, "__len__") for prompt in prompts)
    require(
        not no_ids,
        "prompts must be a list of prompts, each a list of token ids, e.g. [[1, 2], [3]];"
        " `zf.generate` takes a list of texts.",
    )
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        require(
            len(prompt) > 0,
            f"prompt {i} is empty: generation needs at least one token (e.g. the BOS token).",
        )
        require(
            len(prompt) + max_new_tokens <= limit,
            f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} that"
            f" exceeds the model's context of {limit}. Shorten the prompt or lower max_new_tokens.",
        )
        check_ids(prompt, model.config.vocab_size, f"prompt {i}", model.tokenizer)


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """What generate_tokens(model, [prompt], ...) gives, token by token as they come: a compiled
    step for each, called from here.
    """
    check_prompts(model, [prompt], max_new_tokens)
    sampler, stop = (
        sampler or Sampler(),
        tuple(model.config.eos_token_ids if stop is None else stop),
    )
    require_local(model.params, "generate")
    run = packed(model)
    length = padded_length(len(prompt))
    tokens, valid = np.zeros((1, length), np.int32), np.arange(length)[None] >= length - len(prompt)
    tokens[0, length - len(prompt) :] = prompt
    keys = jax.random.fold_in(jax.random.key(seed), 0)[None]
    variables = {"params": run.params}
    # A power of two, so that conversations that grow share their compiled steps.
    room = 1 << (max_new_tokens - 1).bit_length()
    with mesh_in_use(run.params):
        state = prefill(run.config, None, sampler, room, stop, variables, tokens, valid, keys)
    for count in range(1, max_new_tokens + 1):
        yield int(state.last[0])
        if count == max_new_tokens or bool(state.done[0]):
            return
        with mesh_in_use(run.params):
            state = decode_until(
                run.config, None, sampler, stop, variables, state, keys, np.int32(count + 1)
            )
