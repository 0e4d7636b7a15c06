"""What each form of the code that a compiler of TPUs or GPUs asked for is worth: the same programs
with one of them taken back.

Command: python benchmarks/target_variants.py
(about 5 minutes on 2 CPU cores; no weights, nothing is run; needs the extras target-tpu and
target-cuda)
Writes results/target_variants.json and .md: the token loop of zflora-uniform, rank 32, fused and
packed, of Llama-3.2-1B cut to 2 layers, and ffba of Llama-2-7B, whose heads each have keys of their
own; and the bytes that a train step of the 1B sends under tensor=8.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from zflora_jax.adapters import widths
from zflora_jax.adapters.widths import Multiples
from zflora_jax.bench.compiled import DecodeCase, loop_row
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.compiled_plan import compiled_step
from zflora_jax.nn import blocks, layers
from zflora_jax.ops import attention_blocks, copies, head, linear, rope
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.program_text import Program
from zflora_jax.parallel.targets import target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

CONFIG = preset("llama-3.2-1b").replace(num_layers=2)
ADAPTER = AdapterConfig("zflora-uniform", rank=32)
OWN_KEYS, WIDE_HEADS = preset("llama-2-7b").replace(num_layers=2), AdapterConfig("ffba", rank=32)
TARGETS, BATCHES = ("cuda:h100", "tpu:v5e:1x1", "tpu:v6e:1x1"), (1, 8)


def _plain_rows(x: Any, kernel: Any, dtype: Any = None, product: Any = None) -> Any:
    return (product or linear.plain_product)(x, kernel, dtype)


def _plain_query(*given: Any, attend: Any) -> Any:
    return attend(*given)


def _rows_tested_first(table: Any, rows: Any, width: int | None = None) -> Any:
    x = copies.copy_bits(lambda t, r: jnp.take(t, r, axis=0), (table,), (rows,))
    return jnp.pad(x, ((0, 0), (0, 0), (0, (width or x.shape[-1]) - x.shape[-1])))


def _norm_of_a_part(*given: Any) -> Any:
    return _NORMALISE(*given[:-1], False)


_NORMALISE = layers._normalise
Variants = dict[str, list[tuple[Any, str, Any]]]
# What is taken back -> (module, name, what stands there instead).
DECODE: Variants = {
    "as it is": [],
    "widths not filled up": [
        (widths, "MULTIPLES", dict.fromkeys(widths.MULTIPLES, Multiples(1, 1)))
    ],
    "norm over the base's channels": [(layers, "_normalise", _norm_of_a_part)],
    "RoPE over the base's dims": [(rope, "_frequencies", rope.rope_frequencies)],
    "test for missing rows before the zeros": [(layers, "take_rows", _rows_tested_first)],
    "few rows as they are": [
        (linear, "product_of_eight_rows", _plain_rows),
        (head, "product_of_eight_rows", _plain_rows),
    ],
}
QUERIES: Variants = {
    "as it is": [],
    "one query a key head as it is": [(attention_blocks, "one_query_as_eight", _plain_query)],
}
TRAIN: Variants = {
    "as it is": [],
    "gradients in the order of the kernels": [(blocks, "beside", lambda x: x)],
}


@contextmanager
def taken_back(parts: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """The project with other code in some places; nothing traced before is used again."""
    jax.clear_caches()
    with ExitStack() as stack:
        for module, name, instead in parts:
            stack.enter_context(mock.patch.object(module, name, instead))
        yield
    jax.clear_caches()


def decode_rows(
    config: LlamaConfig, adapter: AdapterConfig, variants: Variants, targets: Sequence[str]
) -> Iterator[dict[str, Any]]:
    shown = ("kernels", "copies", "temporaries", "cycles", "floor_share")
    for name, batch in itertools.product(targets, BATCHES):
        for variant, parts in variants.items():
            with taken_back(parts):
                base = loop_row(DecodeCase(config, None, batch), target(name))
                row = loop_row(DecodeCase(config, adapter, batch), target(name))
            yield {"target": target(name).name, "batch": batch, "variant": variant} | {
                "base_kernels": base["kernels"],
                "base_floor_share": base.get("floor_share"),
                **{k: row.get(k) for k in shown},
            }


def train_rows() -> Iterator[dict[str, Any]]:
    run = RunConfig(
        model="llama-3.2-1b",
        adapter=AdapterConfig("zflora-minimal", rank=32),
        data=DataConfig(batch_size=4, bucket_lengths=(1024,)),
        train=TrainConfig(dtype="bfloat16"),
        mesh=MeshConfig(tensor=8),
    )
    for name in ("cuda:h100:8", "tpu:v5e:2x4"):
        for variant, parts in TRAIN.items():
            with taken_back(parts), no_compile_cache():
                step = compiled_step(run, CONFIG, target(name).devices())
            sent = sum(Program(step.as_text()).collectives().values())
            yield {"target": name, "variant": variant, "sent": sent}


def _decode_table(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        {
            "target": row["target"],
            "batch": row["batch"],
            "taken back": row["variant"],
            "kernels": row["kernels"],
            "of the base": row["base_kernels"],
            "copies": row["copies"],
            "temporaries, MiB": f"{row['temporaries'] / 2**20:.1f}",
            "cycles, M": "-" if row["cycles"] is None else f"{row['cycles'] / 1e6:.2f}",
            "of floor": "-" if row["floor_share"] is None else f"{row['floor_share']:.2f}",
            "the base's": "-" if row["floor_share"] is None else f"{row['base_floor_share']:.2f}",
        }
        for row in rows
    ]
    return markdown_table(table, list(table[0]))


def page(result: dict[str, Any]) -> str:
    train = [
        {
            "target": row["target"],
            "taken back": row["variant"],
            "sent by a device, MB": f"{row['sent'] / 1e6:.0f}",
        }
        for row in result["train"]
    ]
    return f"""# What the forms for TPUs and GPUs are worth

**Compiled for, not run.** Each row is the same program with one form of the code taken back; "as it
is" has all of them.

## A token of decode

Llama-3.2-1B cut to 2 layers, bfloat16, zflora-uniform r = 32 fused and packed, prompts of 128
tokens.
kernels, copies, cycles and floor as in [compile_1b](compile_1b.md).

{_decode_table(result["decode"])}

Llama-2-7B cut to 2 layers, ffba r = 32 (heads of 160), the same.

{_decode_table(result["queries"])}

## A train step under tensor parallelism

The same layers, zflora-minimal r = 32 beside the base, 4 rows of 1024 tokens, tensor=8.

{markdown_table(train, list(train[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="results/target_variants")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # leaves a device that is there alone
    result: dict[str, Any] = {"environment": environment()}
    parts = {
        "decode": decode_rows(CONFIG, ADAPTER, DECODE, TARGETS),
        "queries": decode_rows(OWN_KEYS, WIDE_HEADS, QUERIES, TARGETS[1:]),
        "train": train_rows(),
    }
    for part, rows in parts.items():
        result[part] = []
        for row in rows:
            result[part].append(row)
            print(row, flush=True)
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
