"""TTFT and TPOT of base, adapters beside the base, and fused models, interleaved in one process;
optionally beside transformers and PEFT.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench.timing import Contender, bandwidth_meter, decode_turns, ratio, summary
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.inference.decode import decode, packed
from zflora_jax.inference.sampling import Sampler
from zflora_jax.nn.llama import Llama
from zflora_jax.parallel.mesh import mesh_in_use
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.plots import bars, curves
from zflora_jax.reporting.provenance import origin_line
from zflora_jax.reporting.tables import markdown_table

Row = dict[str, Any]
BASE, UNMERGED, IDLE = "base", "lora un-merged", "zflora-minimal idle"
FUSED = tuple(method for method in METHODS if method != "full")


def decode_latency(
    models: Mapping[str, Model],
    *,
    prompt_length: int = 32,
    new_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
) -> dict[str, dict[str, float]]:
    """label -> {ttft_ms, tpot_ms, each also _min and _max}: medians over `repeats` turns of greedy
    decode of random prompts, without stop tokens.
    """
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    ready = {
        label: contender(packed(model), batch, prompt_length, new_tokens)
        for label, model in models.items()
    }
    turns = decode_turns(ready, new_tokens, repeats)
    return {
        label: {k: v for name, values in found.items() for k, v in summary(values, name).items()}
        for label, found in turns.items()
    }


def contender(
    model: Model,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    adapter: AdapterConfig | None = None,
    adapters: trees.Tree | None = None,
    sampler: Sampler | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Contender:
    """Decode (greedy without a `sampler`) of a `model` in the layout that it has, compiled here for
    1 and for `new_tokens` tokens, with XLA's `compiler_options`.

    extra: compile_s, of both, and memory_mb, of the longer one: weights, cache and what else it
    allocates.
    """
    config = model.config
    tokens = (
        np.random.default_rng(0)
        .integers(0, config.vocab_size, (batch, prompt_length))
        .astype(np.int32)
    )
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    given = (
        variables,
        jnp.asarray(tokens),
        jnp.ones(tokens.shape, bool),
        jax.random.split(jax.random.key(0), batch),
    )
    options = dict(compiler_options or {})
    start = time.perf_counter()
    with mesh_in_use(model.params):
        compiled = {
            n: decode.lower(config, adapter, sampler or Sampler(), n, (), *given).compile(options)
            for n in (1, new_tokens)
        }
    extra = {"compile_s": time.perf_counter() - start}
    memory = compiled[new_tokens].memory_analysis()
    if memory is not None:  # not every backend says
        extra["memory_mb"] = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        ) / 1e6

    def generate(count: int) -> object:
        return jax.block_until_ready(compiled[count](*given))

    return Contender(
        generate, read_bytes(variables, config, batch, prompt_length + new_tokens // 2), extra
    )


def read_bytes(variables: trees.Tree, config: LlamaConfig, batch: int, slots: int) -> int:
    """Bytes that one decode step has to read: every weight once (of an untied embedding only the
    rows looked up), and `slots` of the cache.
    """
    table = variables["params"]["embed"]["embedding"]
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    if not config.tie_word_embeddings:
        weights -= table.nbytes
    cache = (
        2
        * batch
        * config.num_layers
        * config.num_kv_heads
        * config.head_dim
        * slots
        * jnp.dtype(config.execution.dtype).itemsize
    )
    return int(weights + cache)


def random_packed(config: LlamaConfig, dtype: str, seed: int = 0) -> Model:
    """A packed model of random weights made in `dtype`: latency does not depend on their values,
    and no float32 copy has to fit.
    """
    config = config.replace(packed=True, scan_layers=False, dtype=dtype)
    shapes: Any = jax.eval_shape(
        Llama(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))
    return Model(
        config,
        jax.tree.map(
            lambda s: 0.02 * jax.random.normal(next(keys), s.shape, jnp.dtype(dtype)), shapes
        ),
    )


def contenders(
    source: Model | LlamaConfig,
    base: Model,
    rank: int,
    methods: Sequence[str],
    shape: tuple[int, int, int],
) -> dict[str, Contender]:
    """label -> contender of `shape` = (batch, prompt_length, new_tokens): the base, LoRA beside it,
    every method of `methods` fused.

    source: a loaded base model, whose fused models are made by `fuse`, or a shape, whose fused
    models have random weights. base: it, packed. What a merge by addition gives (lora, ffa) has the
    base's very shapes: the base decodes under those labels again, which shows the noise. Idle is a
    zflora-minimal whose blocks are zero; of a random model, whose values mean nothing, it is
    zflora-minimal's shapes again.
    """
    lora = AdapterConfig("lora", rank=rank)
    config = base.config.replace(packed=False, scan_layers=True)
    beside = trees.unstack_layers(
        init_adapters(jax.random.key(1), Model(config, {}), lora), config.num_layers
    )
    beside = jax.tree.map(lambda leaf: leaf.astype(config.execution.dtype), beside)
    found = {BASE: contender(base, *shape), UNMERGED: contender(base, *shape, lora, beside)}
    for method in methods:
        adapter = AdapterConfig(method, rank=rank)
        if METHODS[method].in_place != "none":
            found[f"{method} merged"] = found[BASE]
            continue
        found[method] = contender(_fused(source, adapter, base.config.execution.dtype, 1.0), *shape)
        if method == "zflora-minimal":
            zero = isinstance(source, Model)
            found[IDLE] = (
                contender(_fused(source, adapter, base.config.execution.dtype, 0.0), *shape)
                if zero
                else found[method]
            )
    return found


def _fused(source: Model | LlamaConfig, adapter: AdapterConfig, dtype: str, scale: float) -> Model:
    if isinstance(source, LlamaConfig):
        return random_packed(fused_config(source, adapter), dtype)
    adapters = jax.tree.map(
        lambda leaf: scale * jnp.ones_like(leaf), init_adapters(jax.random.key(1), source, adapter)
    )
    return pack_for_decode(fuse(source, adapter, adapters))


def measure(
    source: Model | LlamaConfig,
    *,
    dtype: str = "float32",
    methods: Sequence[str] = FUSED,
    ranks: Sequence[int] = (16,),
    batches: Sequence[int] = (1,),
    prompts: Sequence[int] = (32,),
    new_tokens: int = 32,
    repeats: int = 7,
    peers: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The latency table: every rank at the first batch and prompt length, every batch and prompt
    length at the first rank.

    Returns {"rows": [...]}, a row per case and label: ttft_ms and tpot_ms (medians over turns, with
    _min and _max), their ratios to the base's (medians over turns), read_bytes a token and their
    ratio to the base's, floor_ms = read_bytes / the bandwidth measured in the turn and floor_share
    = floor_ms / tpot_ms (medians), compile_s, memory_mb.
    """
    for name, values in (("ranks", ranks), ("batches", batches), ("prompts", prompts)):
        require(
            len(values) > 0 and min(values) >= 1,
            f"{name}={list(values)}: give at least one, each at least 1.",
        )
    require(new_tokens >= 2, f"new_tokens={new_tokens}: TPOT needs at least 2.")
    require(repeats >= 1, f"repeats={repeats}: must be at least 1.")
    unknown = [m for m in methods if m not in FUSED]
    require(
        not unknown,
        f"methods {unknown} cannot be fused into a base of the same depth here; choose from"
        f" {', '.join(FUSED)}.",
    )
    config = source.config if isinstance(source, Model) else source
    longest, limit = max(prompts) + new_tokens, config.max_position_embeddings
    require(
        longest <= limit,
        f"prompts of {max(prompts)} and {new_tokens} new tokens exceed the model's context of"
        f" {limit}.",
    )
    base = pack_for_decode(source) if isinstance(source, Model) else random_packed(source, dtype)
    meter, rows = bandwidth_meter(), list[Row]()
    cases = dict.fromkeys(
        [(rank, batches[0], prompts[0]) for rank in ranks]
        + [(ranks[0], b, p) for b in batches for p in prompts]
    )
    for rank, batch, prompt in cases:
        case: Row = {"rank": rank, "batch": batch, "prompt": prompt}
        ready = contenders(source, base, rank, methods, (batch, prompt, new_tokens))
        if peers:
            from zflora_jax.bench.peers import decode_contenders

            ready |= decode_contenders(config, dtype, rank, batch, prompt)
        turns = decode_turns(ready, new_tokens, repeats, meter)
        for label, found in turns.items():
            floors = found.pop("floor_ms", None)
            row = (
                case
                | {"label": label}
                | {k: v for name, values in found.items() for k, v in summary(values, name).items()}
            )
            for name in found:
                row[name.replace("_ms", "_ratio")] = ratio(found[name], turns[BASE][name])
            if floors and (size := ready[label].read_bytes) is not None:
                row |= {"read_bytes": size, "bytes_ratio": size / (ready[BASE].read_bytes or size)}
                row |= {
                    "floor_ms": statistics.median(floors),
                    "floor_share": ratio(floors, found["tpot_ms"]),
                }
            rows.append(row | ready[label].extra)
            say(
                f"rank {rank} batch {batch} prompt {prompt}  {label:<28} TTFT {row['ttft_ms']:9.2f}"
                f" ms  TPOT {row['tpot_ms']:8.3f} ms  {row['tpot_ratio']:.3f} x base"
            )
        del ready
    return {"rows": rows}


def page(result: Mapping[str, Any], title: str, pictures: Sequence[str]) -> str:
    """The table as Markdown. result: of `measure`, with "settings" and "environment"."""
    env, settings = result["environment"], result["settings"]
    rates = [
        row["read_bytes"] / row["floor_ms"] / 1e6 for row in result["rows"] if "floor_ms" in row
    ]
    shown = []
    for row in result["rows"]:
        line = {
            "rank": row["rank"],
            "batch": row["batch"],
            "prompt": row["prompt"],
            "": row["label"],
        }
        line |= {"TTFT, ms": f"{row['ttft_ms']:.1f}", "x base": f"{row['ttft_ratio']:.3f}"}
        line |= {
            "TPOT, ms": (
                f"{row['tpot_ms']:.2f} [{row['tpot_ms_min']:.2f}, {row['tpot_ms_max']:.2f}]"
            ),
            "x base ": f"{row['tpot_ratio']:.3f}",
        }
        line |= {"bytes x base": f"{row['bytes_ratio']:.3f}" if "bytes_ratio" in row else "-"}
        line |= {"of floor": f"{row['floor_share']:.2f}" if "floor_share" in row else "-"}
        line |= {"compile, s": f"{row['compile_s']:.1f}" if "compile_s" in row else "-"}
        line |= {"memory, MB": f"{row['memory_mb']:.0f}" if "memory_mb" in row else "-"}
        shown.append(line)
    lines = [
        f"# {title}",
        "",
        (
            f"{settings['model']} ({settings['weights']} weights), {settings['dtype']},"
            f" {settings['new_tokens']} new tokens, greedy. Medians of {settings['repeats']} turns"
            " [least, most]; all labels of a case take turns in one process, compile time apart. x"
            " base: median over turns of the ratio within a turn."
        ),
        (
            "bytes: what a step has to read, weights and half-filled cache. of floor: those bytes"
            f" at the read bandwidth measured in the same turn (medians of {min(rates):.1f} to"
            f" {max(rates):.1f} GB/s), over TPOT. {UNMERGED}: LoRA's products beside packed base"
            " kernels. merged: the base's shapes again."
        ),
        "",
        markdown_table(shown, list(shown[0])),
        "",
        *[f"![{name}]({name})" for name in pictures],
        "",
        origin_line(env),
        "",
    ]
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: str | Path, title: str) -> None:
    """<out>.json, <out>.md and pictures, PNG and SVG: <out>-ratio, TPOT over the base's in the
    first case; <out>-rank, TPOT by rank, if several.
    """
    out, rows = Path(out), result["rows"]
    first = [row for row in rows if all(row[k] == rows[0][k] for k in ("rank", "batch", "prompt"))]
    pictures = [f"{out.name}-ratio.png"]
    spread = {
        row["label"]: abs(
            (row["tpot_ms_max"] - row["tpot_ms_min"]) / 2 / row["tpot_ms"] * row["tpot_ratio"]
        )
        for row in first
    }
    what = (
        f"TPOT / base TPOT, rank {first[0]['rank']}, batch {first[0]['batch']}, prompt"
        f" {first[0]['prompt']}"
    )
    bars(
        {row["label"]: row["tpot_ratio"] for row in first},
        f"{out}-ratio",
        title,
        spread=spread,
        label=what,
    )
    by_rank = [row for row in rows if all(row[k] == rows[0][k] for k in ("batch", "prompt"))]
    if len({row["rank"] for row in by_rank}) > 1:
        pictures.append(f"{out.name}-rank.png")
        series: dict[str, dict[float, float]] = {}
        for row in by_rank:
            series.setdefault(row["label"], {})[row["rank"]] = row["tpot_ms"]
        curves(series, f"{out}-rank", title, x="rank", y="TPOT, ms")
    write_json(f"{out}.json", result)  # no with_suffix: llama-3.2-1b has a dot of its own
    atomic_write(f"{out}.md", page(result, title, pictures).encode())
