"""Decode latency of base, unmerged LoRA and fused models.

All models take turns in one process, compile time is left out, and medians are reported. TTFT is
the time to the first token (prefill), TPOT the time per further token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.inference.generation_config import GREEDY
from zflora_jax.inference.program import DecodeProgram, packed
from zflora_jax.nn.llama import random_model
from zflora_jax.parallel.mesh import mesh_in_use

BASE, UNMERGED = "base", "lora unmerged"
FUSED = tuple(method for method in METHODS if method != "full")
Turns = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Contender:
    """A compiled decode."""

    generate: Callable[[int], object]  # a compiled n -> n tokens; waits for them
    extra: dict[str, float] = field(default_factory=dict)  # more values to report
    model: Model | None = None
    adapters: trees.Tree | None = None  # unmerged


def contender(
    model: Model,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    adapter: AdapterConfig | None = None,
    adapters: trees.Tree | None = None,
) -> Contender:
    """Compiles the greedy decode of random prompts for 1 and for `new_tokens` tokens.

    Args:
      model: The model in the layout to measure, packed or not.
      batch, prompt_length: Number of prompts, and tokens of each.
      new_tokens: Tokens of the longer of the two programs.
      adapter, adapters: Adapters that run unmerged.

    Returns:
      The contender, with compile_s of both programs, and memory_mb, the memory of the longer one.
    """
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, (batch, prompt_length)).astype(np.int32)
    given = (
        {"params": model.params} | ({} if adapters is None else {"adapters": adapters}),
        jnp.asarray(tokens),
        jnp.ones(tokens.shape, bool),
        jax.random.split(jax.random.key(0), batch),
    )
    program, start = DecodeProgram(model.config, adapter, GREEDY), time.perf_counter()
    with mesh_in_use(model.params):
        compiled = {
            n: DecodeProgram.decode.lower(program, *given, n).compile() for n in (1, new_tokens)
        }
    memory: Any = compiled[new_tokens].memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    extra = {"compile_s": time.perf_counter() - start, "memory_mb": used / 1e6}

    def generate(count: int) -> object:
        return jax.block_until_ready(compiled[count](*given))

    return Contender(generate, extra, model, adapters)


def turns(labels: Sequence[str], repeats: int) -> Iterator[str]:
    """Yields every label once per turn; every other turn goes backwards."""
    for turn in range(repeats):
        yield from labels[:: 1 if turn % 2 == 0 else -1]


def decode_turns(
    contenders: Mapping[str, Contender],
    new_tokens: int,
    repeats: int,
    before: Callable[[str], object] = lambda label: None,
) -> Turns:
    """Times contenders by turns, after one call of each that is not counted.

    A turn times for each contender a call that makes 1 token (TTFT) and one that makes
    `new_tokens`; TPOT is their difference over new_tokens - 1. `before` is called with the label
    just before each contender is timed.

    Returns:
      Label -> {"ttft_ms", "tpot_ms"}, one value per turn.
    """
    found: Turns = {label: {"ttft_ms": [], "tpot_ms": []} for label in contenders}

    def milliseconds(label: str, count: int) -> float:
        start = time.perf_counter()
        contenders[label].generate(count)
        return 1e3 * (time.perf_counter() - start)

    for label in contenders:
        milliseconds(label, 1), milliseconds(label, new_tokens)
    for label in turns(list(contenders), repeats):
        before(label)
        first = milliseconds(label, 1)
        further = milliseconds(label, new_tokens) - first
        found[label]["ttft_ms"].append(first)
        found[label]["tpot_ms"].append(further / (new_tokens - 1))
    return found


def summary(values: Sequence[float], name: str) -> dict[str, float]:
    """Returns median, minimum and maximum as `name`, `name`_min and `name`_max."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """Returns the median over turns of the ratio within a turn: a slow turn slows both."""
    return statistics.median(a / b for a, b in zip(values, to, strict=True))


def latency_rows(ready: Mapping[str, Contender], found: Turns) -> list[dict[str, Any]]:
    """Summarises the turns of contenders, `BASE` among them.

    Returns:
      For each a row of "label"; ttft_ms and tpot_ms, medians over turns, with _min and _max;
      ttft_ratio and tpot_ratio to the base's; the contender's extra values.
    """
    rows = []
    for label, of in found.items():
        row: dict[str, Any] = {"label": label}
        for name in ("ttft", "tpot"):
            row |= summary(of[f"{name}_ms"], f"{name}_ms")
            row[f"{name}_ratio"] = ratio(of[f"{name}_ms"], found[BASE][f"{name}_ms"])
        rows.append(row | ready[label].extra)
    return rows


def decode_latency(
    models: Mapping[str, Model],
    *,
    prompt_length: int = 32,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
) -> dict[str, dict[str, Any]]:
    """Times greedy decode of random prompts, without stop tokens, by turns.

    Args:
      models: Label -> base or fused model, `BASE` among them.
      prompt_length, new_tokens, batch, repeats: Arguments of `method_latency`.

    Returns:
      Label -> its row of `latency_rows`.
    """
    shape = batch, prompt_length, new_tokens
    ready = {label: contender(packed(model), *shape) for label, model in models.items()}
    rows = latency_rows(ready, decode_turns(ready, new_tokens, repeats))
    return {row["label"]: row for row in rows}


def method_latency(
    base: Model,
    methods: Iterable[str] = FUSED,
    *,
    rank: int = 16,
    batch: int = 1,
    prompt_length: int = 32,
    new_tokens: int = 32,
    repeats: int = 7,
) -> list[dict[str, Any]]:
    """Times the base, unmerged LoRA and fused models by turns.

    Args:
      base: The base model.
      methods: Methods to fuse, see `contenders`.
      rank: Rank of every adapter.
      batch, prompt_length: Number of prompts, and tokens of each.
      new_tokens: Generated tokens, at least 2.
      repeats: Number of turns.

    Returns:
      A row per contender, see `latency_rows`.
    """
    counts = {"rank": rank, "batch": batch, "prompt_length": prompt_length, "repeats": repeats}
    for name, value in counts.items():
        require(value >= 1, f"{name}={value}: must be at least 1.")
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    methods, limit = list(methods), base.config.max_position_embeddings
    unknown = [method for method in methods if method not in FUSED]
    require(not unknown, f"methods {unknown} cannot be fused; choose from {', '.join(FUSED)}.")
    require(
        prompt_length + new_tokens <= limit,
        f"prompts of {prompt_length} and {new_tokens} new tokens exceed the model's context of"
        f" {limit}.",
    )
    ready = contenders(base, methods, rank, (batch, prompt_length, new_tokens))
    return latency_rows(ready, decode_turns(ready, new_tokens, repeats))


def random_base(config: LlamaConfig, dtype: str) -> Model:
    """Makes a base of random weights, which decodes as fast as a trained one."""
    model = random_model(config.replace(dtype=dtype), jax.random.key(0))
    return Model(model.config, jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))


def contenders(
    base: Model, methods: Sequence[str], rank: int, shape: tuple[int, int, int]
) -> dict[str, Contender]:
    """Compiles the base, unmerged LoRA and fused models.

    A merge by addition keeps the base's shapes, so the base decodes again under its label, which
    shows the noise. shape: (batch, prompt_length, new_tokens).
    """
    packed_base, lora = pack_for_decode(base), AdapterConfig("lora", rank=rank)
    adapters = init_adapters(jax.random.key(1), base, lora)
    adapters = trees.unstack_layers(adapters, base.config.num_layers)
    dtype = base.config.execution.dtype
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)
    found = {
        BASE: contender(packed_base, *shape),
        UNMERGED: contender(packed_base, *shape, lora, adapters),
    }
    for method in methods:
        adapter = AdapterConfig(method, rank=rank)
        if METHODS[method].widens:
            blocks = jax.tree.map(jnp.ones_like, init_adapters(jax.random.key(1), base, adapter))
            found[method] = contender(pack_for_decode(fuse(base, adapter, blocks)), *shape)
        else:
            found[f"{method} merged"] = found[BASE]
    return found
