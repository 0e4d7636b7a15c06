"""Memory of attention against the length of a sequence, as the compilers of TPUs and NVIDIA GPUs
plan it. Nothing is run and no device is needed.

Command: python benchmarks/attention.py
(about 25 minutes on 2 CPU cores; no weights; needs the extras target-tpu and target-cuda)
Writes results/attention.json and results/attention.md: temporaries and custom calls of attention
alone, forward, and forward and backward, by the kernel that `ops.attention` chooses there and by
plain blocks, for packed rows; and of the train step of Llama-3.2-1B cut to 2 layers.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.compiled_plan import compiled_step
from zflora_jax.ops.attention import attention, attention_choice
from zflora_jax.ops.attention_blocks import block_attention
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.parallel.sharding import make_mesh
from zflora_jax.parallel.targets import target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

ROWS, HEADS, KV_HEADS = 2, 32, 8
LENGTHS, WIDTHS = (2048, 4096, 8192), (80, 128, 160)  # 64 at all lengths
MIB = 2**20
DEVICES = {"v5e": "tpu:v5e:2x4", "v6e": "tpu:v6e:2x4", "h100": "cuda:h100"}
ONE, DIVIDED = MeshConfig(), MeshConfig(fsdp=4, tensor=2)
STEPS = [
    *(("h100", length, ONE, False, True) for length in LENGTHS),
    ("h100", 2048, ONE, True, True),
    ("h100", 2048, ONE, False, False),
    *(("v5e", length, ONE, False, True) for length in LENGTHS[:2]),
    ("v5e", 2048, DIVIDED, False, True),
]


def absent_devices(name: str) -> list[Any]:
    return target(DEVICES[name]).devices()


def attention_row(name: str, length: int, width: int, *, blocks: bool) -> dict[str, Any]:
    """What the compiler plans for attention alone."""
    mesh = make_mesh(ONE, absent_devices(name))

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P()))

    arrays = (
        shape(ROWS, length, HEADS, width),
        shape(ROWS, KV_HEADS, width, length),
        shape(ROWS, KV_HEADS, length, width),
        shape(ROWS, length, dtype=jnp.int32),
    )

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        run = block_attention if blocks else attention
        return run(q, k, v, AttentionMask(segments, segments), 64**-0.5)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
        out, back = jax.vjp(lambda *given: forward(*given, segments), q, k, v)
        return out, back(out)

    with jax.set_mesh(mesh):
        chosen, reason = attention_choice(
            arrays[0].shape, KV_HEADS, jnp.bfloat16, AttentionMask(arrays[3], arrays[3])
        )
        found = [jax.jit(f).lower(*arrays).compile() for f in (forward, both)]
    return {
        "device": name,
        "length": length,
        "width": width,
        "kernel": "blocks" if blocks else chosen,
        "reason": "asked for" if blocks else reason,
        "forward": found[0].memory_analysis().temp_size_in_bytes,
        "both": found[1].memory_analysis().temp_size_in_bytes,
        "calls": custom_calls(found[1].as_text()),
    }


def step_row(
    name: str, length: int, mesh: MeshConfig, remat: bool, packing: bool
) -> dict[str, Any]:
    """What the compiler plans for a train step."""
    run = RunConfig(
        model="llama-3.2-1b",
        adapter=AdapterConfig("zflora-minimal", rank=32),
        train=TrainConfig(dtype="bfloat16", remat="block" if remat else "dots"),
        mesh=mesh,
        data=DataConfig(
            batch_size=ROWS * mesh.data * mesh.fsdp, bucket_lengths=(length,), packing=packing
        ),
    )
    config = replace(preset("llama-3.2-1b"), num_layers=2)
    found = compiled_step(run, config, absent_devices(name))
    return {
        "device": name,
        "length": length,
        "mesh": {"fsdp": mesh.fsdp, "tensor": mesh.tensor},
        "remat": remat,
        "packing": packing,
        "temporaries": found.memory_analysis().temp_size_in_bytes,
        "calls": custom_calls(found.as_text()),
    }


def custom_calls(text: str) -> dict[str, int]:
    """Name -> how often an attention kernel stands in a compiled program's text."""
    names = re.findall(r"%(splash_\w+?)[.\d]* = .*tpu_custom_call", text)
    names += re.findall(r'custom_call_target="(__cudnn\$fmha\w+)"', text)
    return dict(sorted(Counter(names).items()))


def measure() -> dict[str, Any]:
    rows, steps = [], []
    cases = [(length, 64) for length in LENGTHS] + [(4096, width) for width in WIDTHS]
    for name in DEVICES:
        for length, width in cases:
            for blocks in (False, True) if width == 64 else (False,):
                rows.append(attention_row(name, length, width, blocks=blocks))
                print(rows[-1], flush=True)
    for case in STEPS:
        steps.append(step_row(*case))
        print(steps[-1], flush=True)
    return {"rows": rows, "steps": steps, "environment": environment()}


def page(result: dict[str, Any]) -> str:
    """The page of a result."""

    def mib(size: int) -> float:
        return round(size / MIB, 1)

    def calls(row: dict[str, Any]) -> str:
        return ", ".join(f"{n} x `{name}`" for name, n in row["calls"].items()) or "none"

    alone = table(
        [
            "compiled for",
            "T",
            "head",
            "kernel",
            "forward, MiB",
            "and backward, MiB",
            "custom calls",
        ],
        [
            [
                *(row["device"], row["length"], row["width"], row["kernel"]),
                *(mib(row["forward"]), mib(row["both"]), calls(row)),
            ]
            for row in result["rows"]
        ],
    )
    steps = table(
        [
            "compiled for",
            "T",
            "mesh",
            "rows",
            "all of a layer again",
            "temporaries, MiB",
            "custom calls",
        ],
        [
            [
                row["device"],
                row["length"],
                " x ".join(f"{axis}={n}" for axis, n in row["mesh"].items()),
                "packed" if row["packing"] else "one sequence each",
                "yes" if row["remat"] else "no",
                mib(row["temporaries"]),
                calls(row),
            ]
            for row in result["steps"]
        ],
    )
    return f"""# Memory of attention

Compiled for the devices named, not run: temporaries are what their compilers plan, without what
cuDNN itself asks for while it runs, which only a GPU tells.

## Attention alone

{ROWS} packed rows of T tokens, {HEADS} query and {KV_HEADS} key heads, bfloat16, one device.
"blocks" is what runs where no flash kernel applies.

{alone}

What each further token of a row adds to forward and backward, head 64. Equal numbers are linear
growth; memory that grew with T x T would double them.

{growth(result["rows"])}

## A train step

Llama-3.2-1B cut to 2 layers, zflora-minimal r=32, bfloat16, {ROWS} rows of T tokens for each
device along fsdp; per device. The layers are one loop body: its text holds the forward kernel once,
so the backward pass does not run it again, unless all of a layer is computed again
(`train.remat=block`).

{steps}

{origin_line(result["environment"])}
"""


def table(headings: list[str], cells: list[list[Any]]) -> str:
    return markdown_table([dict(zip(headings, row, strict=True)) for row in cells], headings)


def growth(rows: list[dict[str, Any]]) -> str:
    """What each further token of a row costs forward and backward, as a table."""
    found = []
    for device, kernel in dict.fromkeys((row["device"], row["kernel"]) for row in rows):
        sizes = {
            row["length"]: row["both"]
            for row in rows
            if (row["device"], row["kernel"], row["width"]) == (device, kernel, 64)
        }
        if len(sizes) == len(LENGTHS):
            steps = [(sizes[b] - sizes[a]) / (b - a) / 1024 for a, b in pairwise(LENGTHS)]
            found.append([device, kernel, *(round(step, 1) for step in steps)])
    return table(
        ["compiled for", "kernel", *(f"T = {a} to {b}, KiB" for a, b in pairwise(LENGTHS))], found
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="results/attention")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    result = measure()
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
