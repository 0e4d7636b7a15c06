"""Ways to decode that were tried, against the one that is kept: packed kernels [out, in], unrolled
layers, one compiled loop.

Command: python benchmarks/decode_variants.py     (about 10 minutes on 2 CPU cores)
Writes results/decode_variants.json and .md: TTFT and TPOT of SmolLM2-135M (the packaged one), all
ways by turns in one process, for each batch; and how fast the products of its kernels alone read
them, by layout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench.contenders import contender
from zflora_jax.bench.timing import Contender, bandwidth_meter, decode_turns, ratio, summary
from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model
from zflora_jax.inference.generation_config import Sampler
from zflora_jax.inference.program import next_logits
from zflora_jax.nn import layers
from zflora_jax.nn.kv_cache import init_cache
from zflora_jax.ops import head as output_head, linear
from zflora_jax.ops.sampling import greedy
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

KEPT = "kept: packed [out, in], unrolled, one compiled loop"


def host_loop(model: Model, batch: int, prompt_length: int, new_tokens: int) -> Contender:
    """A compiled step per token, called from Python, the cache donated; the tokens stay on the
    device until the end.
    """
    config, slots = model.config, prompt_length + new_tokens
    tokens = jnp.asarray(
        np.random.default_rng(0)
        .integers(0, config.vocab_size, (batch, prompt_length))
        .astype(np.int32)
    )

    @jax.jit(donate_argnums=2)
    def step(params: Any, tokens: Any, cache: Any) -> Any:
        logits, cache = next_logits(config, None, {"params": params}, tokens, None, cache)
        return greedy(logits)[:, None], cache

    def generate(count: int) -> object:
        token, cache = step(model.params, tokens, init_cache(config, batch, slots))
        out = [token]
        for _ in range(count - 1):
            token, cache = step(model.params, token, cache)
            out.append(token)
        return jax.block_until_ready(jnp.concatenate(out, axis=1))

    return Contender(generate)


def ways(batch: int, prompt_length: int, new_tokens: int, bfloat16: bool) -> dict[str, Contender]:
    shape = (batch, prompt_length, new_tokens)
    model = load_model("smollm2-135m", dtype="float32")
    packed = pack_for_decode(model)
    unrolled = Model(
        model.config.replace(scan_layers=False),
        trees.unstack_layers(model.params, model.config.num_layers),
    )
    head = packed.params | {
        "lm_head": {"kernel": jnp.asarray(packed.params["embed"]["embedding"].T)}
    }
    found = {
        KEPT: contender(packed, *shape),
        **{
            f"products {name}": with_products(PRODUCTS[name], lambda: contender(packed, *shape))
            for name in (LEFT, RIGHT, HALVES)
        },
        "kernels [in, out], not packed, unrolled": contender(unrolled, *shape),
        "kernels [in, out], not packed, scan over layers": contender(model, *shape),
        "head (d, V) beside the embeddings": contender(
            Model(packed.config.replace(tie_word_embeddings=False), head), *shape
        ),
        "vectors of 512 bits instead of XLA's 256": contender(
            packed, *shape, compiler_options={"xla_cpu_prefer_vector_width": 512}
        ),
        "a compiled step per token, called from Python": host_loop(packed, *shape),
        "sampled: temperature 0.8": contender(packed, *shape, sampler=Sampler(0.8)),
        "sampled: temperature 0.8, top_k 50, top_p 0.95": contender(
            packed, *shape, sampler=Sampler(0.8, 50, 0.95)
        ),
        "sampled: temperature 0.8, top_p 0.95": contender(
            packed, *shape, sampler=Sampler(0.8, None, 0.95)
        ),
    }
    if bfloat16:
        narrow = pack_for_decode(load_model("smollm2-135m", dtype="bfloat16"))
        found["bfloat16 weights and activations"] = contender(narrow, *shape)
        for name, product in {
            RIGHT: PRODUCTS[RIGHT],
            "x [out, in]^T in float32, no barrier": unguarded_product,
        }.items():
            found[f"bfloat16, products {name}"] = with_products(
                product, lambda: contender(narrow, *shape)
            )
    return found


KERNELS = (
    ("q|k|v", 960, 576),
    ("q|k|v, 12 more inputs", 960, 588),  # half a vector of 256 bits
    ("q|k|v, 16 more inputs", 960, 592),
    ("o", 576, 576),
    ("gate|up", 3072, 576),
    ("down", 576, 1536),
    ("head", 49152, 576),
)

LEFT, RIGHT, HALVES = "x [out, in]^T", "[out, in] from the right", "[out, in] in halves"
PRODUCTS: dict[str, Callable[..., Any]] = {  # x [B, T, in] and a kernel -> [B, T, out]
    "x [in, out]": lambda x, w: x @ w,
    LEFT: linear.plain_product,
    RIGHT: linear.product_from_the_right,
    HALVES: linear.product_in_halves,
}


def unguarded_product(x: Any, kernel: Any, dtype: Any = None) -> Any:
    """`linear.bfloat16_product` without its barrier and its second row."""
    return linear.plain_product(x, kernel, jnp.float32).astype(dtype or x.dtype)


def with_products(product: Callable[..., Any], make: Callable[[], Contender]) -> Contender:
    """What `make` compiles where `linear.packed_linear`, that is all kernels of layers and the
    head, is `product`.
    """
    jax.clear_caches()
    with (
        mock.patch.object(layers, "packed_linear", product),
        mock.patch.object(output_head, "packed_linear", product),
    ):
        made = make()
    jax.clear_caches()
    return made


def read_rates(batch: int, repeats: int) -> list[dict[str, Any]]:
    """GB/s at which products of `batch` rows read SmolLM2's packed kernels, more of them than the
    caches hold.
    """
    rows = []
    for name, out, inner in KERNELS:
        count = -(-(2**27) // (4 * out * inner))
        keys, row = jax.random.split(jax.random.key(0), count), {"batch": batch, "kernel": name}
        for label, product in PRODUCTS.items():
            shape = (inner, out) if label == "x [in, out]" else (out, inner)
            kernels = [jax.random.normal(key, shape) for key in keys]

            @jax.jit
            def chain(x: Any, kernels: Any, product: Any = product) -> Any:
                for w in kernels:  # each needs the one before it
                    x = x + 1e-9 * product(x, w)[..., :1]
                return x

            x, seconds = jnp.ones((batch, 1, inner)), []
            jax.block_until_ready(chain(x, kernels))
            for _ in range(repeats):
                start = time.perf_counter()
                jax.block_until_ready(chain(x, kernels))
                seconds.append(time.perf_counter() - start)
            row[label] = count * 4 * out * inner / statistics.median(seconds) / 1e9
        rows.append(row)
    return rows


def choices(batch: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to choose among the logits [batch, 49152] of a step, by part."""
    logits = jax.random.normal(jax.random.key(0), (batch, 49152)) * 3
    parts: dict[str, Callable[[Any], Any]] = {
        "argmax": lambda x: jnp.argmax(x, axis=-1),
        "greedy (kept)": greedy,
        "sort, as top_p by definition": lambda x: jnp.sort(x, axis=-1, descending=True),
        "top_p by bisection (kept)": lambda x: Sampler(1.0, None, 0.95).cut(x)[0],
        "top_k 50": lambda x: jax.lax.top_k(x, 50),
        "Gumbel noise for all": lambda x: jax.vmap(jax.random.categorical)(
            jax.random.split(jax.random.key(0), batch), x
        ),
    }
    row: dict[str, Any] = {"batch": batch}
    for label, part in parts.items():
        compiled, seconds = jax.jit(part), []
        jax.block_until_ready(compiled(logits))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(logits))
            seconds.append(time.perf_counter() - start)
        row[label] = 1e3 * statistics.median(seconds)
    return row


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--no-bfloat16", dest="bfloat16", action="store_false", help="leave its three ways out"
    )
    parser.add_argument("--out", default="results/decode_variants")
    args = parser.parse_args()
    if min(*args.batches, args.prompt, args.repeats, args.new_tokens - 1) < 1:
        parser.error(
            "--batches, --prompt and --repeats: give at least 1; --new-tokens: at least 2, for a"
            " time between tokens"
        )
    return args


def decode_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """TTFT and TPOT of every way, batch by batch."""
    rows, meter = list[dict[str, Any]](), bandwidth_meter()
    for batch in args.batches:
        found = ways(batch, args.prompt, args.new_tokens, args.bfloat16)
        turns = decode_turns(found, args.new_tokens, args.repeats, meter)
        for label, times in turns.items():
            row: dict[str, Any] = {"batch": batch, "way": label}
            for name in ("ttft_ms", "tpot_ms"):
                row |= summary(times[name], name) | {
                    name.replace("_ms", "_ratio"): ratio(times[name], turns[KEPT][name])
                }
            if (size := found[label].read_bytes) is not None:
                row["floor_ratio"] = ratio(times["tpot_ms"], times["floor_ms"])
                row["read_gb_per_s"] = size / statistics.median(times["floor_ms"]) / 1e6
            rows.append(row)
            print(row, flush=True)
        del found
    return rows


def page(result: dict[str, Any]) -> str:
    settings = result["settings"]
    rates = [row["read_gb_per_s"] for row in result["rows"] if "read_gb_per_s" in row]
    shown = [
        {
            "batch": row["batch"],
            "way": row["way"],
            "TTFT, ms": f"{row['ttft_ms']:.1f}",
            "x kept": f"{row['ttft_ratio']:.3f}",
            "TPOT, ms": (
                f"{row['tpot_ms']:.2f} [{row['tpot_ms_min']:.2f}, {row['tpot_ms_max']:.2f}]"
            ),
            "x kept ": f"{row['tpot_ratio']:.3f}",
            "x floor": f"{row['floor_ratio']:.2f}" if "floor_ratio" in row else "-",
        }
        for row in result["rows"]
    ]
    return f"""# Ways to decode

SmolLM2-135M, float32 unless a row names another dtype, prompt {settings["prompt"]},
{settings["new_tokens"]} new tokens; medians of {settings["repeats"]} turns [minimum, maximum].
"x kept" is the median over turns of the ratio within a turn. "x floor" is TPOT over the time to
read weights and half-filled cache once, at the rate measured in the same turn (medians:
{min(rates):.1f} to {max(rates):.1f} GB/s).

{markdown_table(shown, list(shown[0]))}

Products alone: GB/s at which they read the kernels, by layout.

{rounded(result["products"], 1)}

Choosing a token alone, ms:

{rounded(result["choices"], 2)}

{origin_line(result["environment"])}
"""


def rounded(rows: list[dict[str, Any]], digits: int) -> str:
    """A table whose floats have `digits` decimals."""
    shown = [
        {k: f"{v:.{digits}f}" if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]
    return markdown_table(shown, list(shown[0]))


def main() -> None:
    args, env = parse_args(), environment()
    result = {
        "rows": decode_rows(args),
        "products": [row for batch in args.batches for row in read_rates(batch, args.repeats)],
        "choices": [choices(batch, args.repeats) for batch in args.batches],
        "settings": vars(args),
        "environment": env,
    }
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
