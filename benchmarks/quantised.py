"""A base of codes and scales: what it costs in quality, what it saves in memory and time.

Command: python benchmarks/quantised.py [--parts quality decode compiled]
(about 45 minutes on 2 CPU cores with nothing else running; `compiled` needs the extras target-tpu
and target-cuda)
Writes results/quantised.json and .md; a part that is not named keeps its rows of before, and parts
may run side by side.
quality: adapters of each method are trained beside SmolLM2-135M in float32 as the quickstart does;
then the base is quantised, and the adapters run beside it, or are fused with it (their blocks as
codes of the base's kind), or, of LoRA, are merged in float32 and the result is quantised, as other
tools do. decode: greedy tokens on this CPU, by turns. compiled: the token loop of two layers
of Llama-3.2-1B and train steps of Llama-2-7B, compiled for devices that are absent and not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import zflora_jax as zf
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench.compiled import loop_row
from zflora_jax.bench.contenders import contender
from zflora_jax.bench.decode_case import DecodeCase
from zflora_jax.bench.timing import decode_turns, ratio, summary
from zflora_jax.cli.inputs import load_config
from zflora_jax.core import trees
from zflora_jax.core.presets import preset
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import (
    DataConfig,
    RunConfig,
    TrainConfig,
)
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.compiled_plan import compiled_step, planned_bytes
from zflora_jax.experiments.setup import held_out
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.targets import GIB, target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.trainer import fresh_state, make_train_step

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("int8", "q8_0", "int4", "nf4", "q4_0", "q4_1")
ADAPTERS = {
    "lora": zf.AdapterConfig("lora", rank=16),
    "ffba": zf.AdapterConfig("ffba", rank=32, extra_head_dim=16),
    "zflora-minimal": zf.AdapterConfig("zflora-minimal", rank=16),
    "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=16, extra_head_dim=16),
}
TARGETS = ("cuda:h100", "tpu:v5e:1x1")
Row = dict[str, Any]


def run_of(adapter: zf.AdapterConfig) -> RunConfig:
    """The quickstart's run, with another adapter."""
    run = load_config(str(ROOT / "configs" / "quickstart.py"), "get_config")
    return dataclasses.replace(run, adapter=adapter)


def trained(run: RunConfig, base: zf.Model) -> trees.Tree:
    """Adapters after the run's steps, in memory: rows of the training split in their order."""
    from zflora_jax.data.mixture import load_mixture
    from zflora_jax.data.pipeline import eval_batches, one_sequence_a_row
    from zflora_jax.data.tokenization import tokenize_examples

    examples = load_mixture(run.data, "train", 8 * run.train.steps)
    encoded = tokenize_examples(examples, base.tokenizer, run.data, base.config.vocab_size)
    step = make_train_step(base.config, run.adapter, run.optim, run.train.steps)
    state = fresh_state(run, base)
    for batch in eval_batches(encoded, 8, run.data.bucket_lengths):
        state, _ = step(base.params, state, one_sequence_a_row(batch))
    return state.adapters


def scores(run: RunConfig, model: zf.Model) -> Row:
    """Held-out loss (nats per target token) and accuracy of a base or fused model, computed with
    the numbers that its codes stand for, which takes less time on a CPU.
    """
    found = evaluate(run, zf.dequantize_model(model), console=False)
    return {"loss": found["loss"], "accuracy": found["accuracy"]}


def quality() -> Iterable[Row]:
    """Rows of the base, and of each method beside codes and in one with them."""
    base = zf.load_model("smollm2-135m")
    stored = {"float32": base} | {kind: zf.quantize_model(base, kind) for kind in KINDS}
    for kind, model in stored.items():
        run = run_of(ADAPTERS["lora"])
        yield {"method": "base", "kind": kind} | scores(run, model)
    for method, adapter in ADAPTERS.items():
        run = run_of(adapter)
        rows, adapters = held_out(run, base), trained(run, base)
        merged = zf.fuse(base, adapter, adapters)
        for kind, model in stored.items():
            if kind == "float32":
                one = merged
            elif method == "lora":
                one = zf.quantize_model(merged, kind)
            else:
                one = zf.fuse(model, adapter, adapters)
            beside = held_out_loss(run, zf.dequantize_model(model), rows, adapters)["loss"]
            yield {"method": method, "kind": kind, "beside": beside} | scores(run, one)


def decode(repeats: int, new_tokens: int) -> Iterable[Row]:
    """Milliseconds a token on this CPU, and bytes of the parameters."""
    base = zf.load_model("smollm2-135m")
    adapter = ADAPTERS["zflora-minimal"]
    adapters = zf.init_adapters(jax.random.key(0), base, adapter)
    whole = {
        "int8": QuantizeConfig("int8", embedding="int8"),
        "q8_0": QuantizeConfig("q8_0", embedding="q8_0"),
    }
    bases = {"float32": base} | {n: zf.quantize_model(base, how) for n, how in whole.items()}
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


def compiled(targets: list[str]) -> Iterable[Row]:
    """What compilers say of absent devices."""
    config = preset("llama-3.2-1b").replace(num_layers=2)
    methods = {
        "base": None,
        "zflora-minimal": zf.AdapterConfig("zflora-minimal", rank=32),
        "zflora-uniform": zf.AdapterConfig("zflora-uniform", rank=32),
    }
    for name in targets:
        for kind in ("none", "int8", "int4", "nf4", "q4_1"):
            how = None if kind == "none" else QuantizeConfig(kind)
            for method, adapter in methods.items():
                row = loop_row(DecodeCase(config, adapter, quantize=how), target(name))
                yield {"target": name, "kind": kind, "method": method} | row
    for name in targets:
        for kind in ("none", "int8", "nf4"):
            run = RunConfig(
                model="llama-2-7b",
                adapter=zf.AdapterConfig("zflora-minimal", rank=16),
                data=DataConfig(batch_size=4, bucket_lengths=(512,)),
                train=TrainConfig(dtype="bfloat16", remat="block"),
                quantize=QuantizeConfig(kind),  # type: ignore[arg-type]
            )
            row = {"target": name, "kind": kind, "train": "llama-2-7b, 4 x 512 tokens"}
            try:
                step = compiled_step(run, preset("llama-2-7b"), target(name).devices())
                yield row | {"bytes": planned_bytes(step)}
            except jax.errors.JaxRuntimeError:  # the compiler finds that it does not fit
                yield row | {"bytes": None}


def page(result: dict[str, Any]) -> str:
    lines = ["# Quantised bases", ""]

    def origin(part: str) -> str:
        return origin_line(result["origins"][part])

    if rows := result.get("quality"):
        lines += [
            "## Quality",
            "",
            "Generated arithmetic, 100 held-out rows, SmolLM2-135M, adapters trained beside the"
            " float32 base as the quickstart does (60 steps of 8 rows). Loss: nats per target"
            " token; its exponential is the perplexity. beside: the adapters in float32, the"
            " base as stored. in one: of LoRA, added to the float32 base and the sum quantised"
            " anew; of the others, fused: their blocks are codes of the base's kind, and the"
            " base's codes are what they were. float32: nothing is quantised. The packaged model"
            " is itself Q4_1, so other kinds round its numbers a second time.",
            "",
        ]
        table = [
            {
                "model": row["method"],
                "stored as": row["kind"],
                "loss, beside": f"{row['beside']:.4f}" if "beside" in row else "-",
                "loss, in one": f"{row['loss']:.4f}",
                "accuracy, in one": f"{row['accuracy']:.2f}",
            }
            for row in rows
        ]
        lines += [markdown_table(table, list(table[0])), "", origin("quality"), ""]
    if rows := result.get("decode"):
        lines += [
            "## Decode on this CPU",
            "",
            "SmolLM2-135M, float32 activations, batch 1, greedy tokens after a prompt of 64,"
            " medians of turns. A CPU ratio says nothing about GPUs."
            " program: weights, cache and temporaries of prefill and decode, as XLA allocates them."
            " int8 and q8_0: the embedding, which is the head, too.",
            "",
        ]
        table = [
            {
                "stored as": row["kind"],
                "model": row["method"],
                "parameters, MB": f"{row['parameters_mb']:.1f}",
                "program, MB": f"{row['program_mb']:.0f}",
                "TPOT, ms": f"{row['tpot_ms']:.2f}",
                "TPOT / float32 base": f"{row['of_float32']:.2f}",
                "TPOT / its base": f"{row['of_base']:.3f}",
                "TTFT / float32 base": f"{row['ttft_of_float32']:.2f}",
            }
            for row in rows
        ]
        lines += [markdown_table(table, list(table[0])), "", origin("decode"), ""]
    if rows := result.get("compiled"):
        lines += [*_compiled_page(rows), "", origin("compiled"), ""]
    return "\n".join(lines)


def _compiled_page(rows: list[Row]) -> list[str]:
    loops = [
        {
            "target": row["target"],
            "stored as": row["kind"],
            "model": row["method"],
            "kernels": row["kernels"],
            "copies": row["copies"],
            "read, MiB": f"{row['read_bytes'] / 2**20:.0f}",
            "temporaries, MiB": f"{row['temporaries'] / 2**20:.0f}",
            "cycles, M": f"{row['cycles'] / 1e6:.2f}" if "cycles" in row else "-",
            "of the floor": f"{row['floor_share']:.2f}" if "floor_share" in row else "-",
        }
        for row in rows
        if "train" not in row
    ]
    steps = [
        {
            "target": row["target"],
            "base stored as": row["kind"],
            "arguments, GiB": f"{row['bytes']['arguments'] / GIB:.2f}" if row["bytes"] else "-",
            "temporaries, GiB": f"{row['bytes']['temporaries'] / GIB:.2f}" if row["bytes"] else "-",
            "total, GiB": f"{row['bytes']['total'] / GIB:.2f}" if row["bytes"] else "does not fit",
        }
        for row in rows
        if "train" in row
    ]
    return [
        "## Compiled for absent devices, not run",
        "",
        "One token of Llama-3.2-1B cut to two layers, bfloat16, batch 1, prompt of 128, rank 32;"
        " embedding and head are bfloat16 (502 MiB of what is read). copies: operations of a token"
        " that write a whole kernel anew, as a float copy of codes would be.",
        "",
        markdown_table(loops, list(loops[0])),
        "",
        "A train step of Llama-2-7B, zflora-minimal r = 16, 4 x 512 tokens, remat block. A"
        " dequantised copy of the base would show as temporaries of 12.3 GiB more.",
        "",
        markdown_table(steps, list(steps[0])),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("quality", "decode", "compiled")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="of compiled"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="turns of decode")
    parser.add_argument("--tokens", type=int, default=48, metavar="N", help="that decode makes")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "quantised")
    args = parser.parse_args()
    made = {
        "quality": quality,
        "decode": lambda: decode(args.repeats, args.tokens),
        "compiled": lambda: compiled(args.targets),
    }
    for part in args.parts:
        rows = []
        for row in made[part]():
            print(row, flush=True)
            rows.append(row)
        there = args.out.with_suffix(".json")
        result = (
            json.loads(there.read_text(encoding="utf-8")) if there.exists() else {"origins": {}}
        )
        result[part] = rows
        result["origins"][part] = environment()
        write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
