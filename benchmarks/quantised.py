"""A quantised base: its memory and decode time.

Command: python benchmarks/quantised.py [--parts decode compiled]
(about 30 minutes on 2 CPU cores; `compiled` needs the extras target-tpu and target-cuda)
Writes results/quantised.json and .md. A part that is not named keeps its rows.
decode: greedy tokens on this CPU, by turns.
compiled: the token loop of two layers of Llama-3.2-1B and train steps of Llama-2-7B, compiled for
absent devices and not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from decode_programs import DecodeCase, loop_row
from harness import arguments, at_least, origins, perturbed, write_part

import zflora_jax as zf
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.presets import preset
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import DataConfig, RunConfig, TrainConfig
from zflora_jax.experiments.latency import contender, decode_turns, ratio, summary
from zflora_jax.experiments.plan import compile_step
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.targets import GIB, target
from zflora_jax.reporting.tables import markdown_table

TARGETS = ("cuda:h100", "tpu:v5e:1x1")
Row = dict[str, Any]


def decode(repeats: int, new_tokens: int) -> Iterable[Row]:
    """Rows of the time per token on this CPU and the bytes of the parameters."""
    base = zf.load_model("smollm2-135m")
    adapter = zf.AdapterConfig("zflora-minimal", rank=16)
    adapters = perturbed(base, adapter)
    bases = {"float32": base}
    for kind in ("int8", "q8_0"):
        bases[kind] = zf.quantize_model(base, QuantizeConfig(kind, embedding=kind))
    bases["q4_1, as in the file"] = zf.load_model("smollm2-135m", quantize="keep")
    models = {}
    for name, model in bases.items():
        models[name, "base"] = pack_for_decode(model)
        models[name, adapter.method] = pack_for_decode(zf.fuse(model, adapter, adapters))
    ready = {f"{n}/{m}": contender(x, 1, 64, new_tokens) for (n, m), x in models.items()}
    found = decode_turns(ready, new_tokens, repeats)
    for (name, method), model in models.items():
        here, own = found[f"{name}/{method}"], found[f"{name}/base"]
        first = found["float32/base"]
        yield {
            "kind": name,
            "method": method,
            "parameters_mb": sum(map(bytes_of, trees.flatten(model.params).values())) / 1e6,
            "program_mb": ready[f"{name}/{method}"].extra["memory_mb"],
            "of_float32": ratio(here["tpot_ms"], first["tpot_ms"]),
            "of_base": ratio(here["tpot_ms"], own["tpot_ms"]),
            "ttft_of_float32": ratio(here["ttft_ms"], first["ttft_ms"]),
        } | summary(here["tpot_ms"], "tpot_ms")


def compiled() -> Iterable[Row]:
    """Rows of token loops and of train steps, compiled for absent devices."""
    config = preset("llama-3.2-1b").replace(num_layers=2)
    methods = {
        "base": None,
        "lora unmerged": zf.AdapterConfig("lora", rank=32),
        "zflora-minimal": zf.AdapterConfig("zflora-minimal", rank=32),
        "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=32),
    }
    for name in TARGETS:
        for kind in ("none", "int8", "int4", "nf4", "q4_1"):
            how = None if kind == "none" else QuantizeConfig(kind)
            for method, adapter in methods.items():
                row = loop_row(DecodeCase(config, adapter, quantize=how), target(name))
                yield {"target": name, "kind": kind, "method": method} | row
    for name in TARGETS:
        for kind in ("none", "int8", "nf4"):
            run = RunConfig(
                model="llama-2-7b",
                adapter=zf.AdapterConfig("zflora-minimal", rank=16),
                data=DataConfig(batch_size=4, bucket_lengths=(512,)),
                train=TrainConfig(dtype="bfloat16", remat="block"),
                quantize=QuantizeConfig(kind),  # type: ignore[arg-type]
            )
            row = {"target": name, "kind": kind, "train": "llama-2-7b, 4 x 512 tokens"}
            found, _ = compile_step(run, preset("llama-2-7b"), target(name))
            yield row | {"bytes": found.get("bytes")}  # none: the compiler refuses it


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    sections = {"decode": (_decode_table, DECODE), "compiled": (_loop_table, COMPILED)}
    lines = ["# Quantised bases", ""]
    for part, (table, text) in sections.items():
        if rows := result.get(part):
            lines += [text, _markdown(table(row) for row in rows if "train" not in row), ""]
            if steps := [_step_table(row) for row in rows if "train" in row]:
                lines += [STEPS, _markdown(steps), ""]
            lines += [origins(result, part), ""]
    return "\n".join(lines)


def _markdown(rows: Iterable[Row]) -> str:
    rows = list(rows)
    return markdown_table(rows, list(rows[0]))


DECODE = """## Decode on this CPU

SmolLM2-135M, float32 activations, batch 1, greedy tokens after a prompt of 64, medians of turns.
program: weights, cache and temporaries of prefill and decode, as XLA allocates them. int8 and q8_0
quantise the embedding, too.
"""
COMPILED = """## Compiled for absent devices, not run

One token of Llama-3.2-1B cut to two layers, bfloat16, batch 1, prompt of 128, rank 32; embedding
and head are bfloat16 (502 MiB of the bytes read). copies: operations of a token that write a whole
kernel, as a dequantised copy would be.
"""
STEPS = """A train step of Llama-2-7B, zflora-minimal r = 16, 4 x 512 tokens, remat block. A
dequantised copy of the base would show as 12.3 GiB more temporaries.
"""


def _decode_table(row: Row) -> Row:
    return {
        "base": row["kind"],
        "model": row["method"],
        "parameters, MB": f"{row['parameters_mb']:.1f}",
        "program, MB": f"{row['program_mb']:.0f}",
        "TPOT, ms": f"{row['tpot_ms']:.2f}",
        "TPOT / float32 base": f"{row['of_float32']:.2f}",
        "TPOT / its base": f"{row['of_base']:.3f}",
        "TTFT / float32 base": f"{row['ttft_of_float32']:.2f}",
    }


def _loop_table(row: Row) -> Row:
    return {
        "target": row["target"],
        "base": row["kind"],
        "model": row["method"],
        "kernels": row["kernels"],
        "copies": row["copies"],
        "read, MiB": f"{row['read_bytes'] / 2**20:.0f}",
        "temporaries, MiB": f"{row['temporaries'] / 2**20:.0f}",
        "cycles, M": f"{row['cycles'] / 1e6:.2f}" if "cycles" in row else "-",
        "of the floor": f"{row['floor_share']:.2f}" if "floor_share" in row else "-",
    }


def _step_table(row: Row) -> Row:
    line = {"target": row["target"], "base": row["kind"]}
    sizes = row["bytes"]
    for name in ("arguments", "temporaries", "total"):
        line[f"{name}, GiB"] = f"{sizes[name] / GIB:.2f}" if sizes else "does not fit"
    return line


def main() -> None:
    parser = arguments(__doc__, "quantised")
    parts = ("decode", "compiled")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=9, help="turns of decode")
    parser.add_argument("--tokens", type=int, default=48, help="generated tokens of decode")
    args = parser.parse_args()
    at_least(parser, args, repeats=1, tokens=2)
    made = {"decode": lambda: decode(args.repeats, args.tokens), "compiled": compiled}
    for part in args.parts:
        rows = []
        for row in made[part]():
            print(row, flush=True)
            rows.append(row)
        write_part(args.out, part, rows, page)


if __name__ == "__main__":
    main()
