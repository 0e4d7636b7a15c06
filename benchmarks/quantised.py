"""A quantised base: its quality, memory and decode time.

Command: python benchmarks/quantised.py [--parts quality decode compiled]
(about 45 minutes on 2 CPU cores; `compiled` needs the extras target-tpu and target-cuda)
Writes results/quantised.json and .md. A part that is not named keeps its rows.
quality: adapters of each method are trained on the float32 base as the quickstart does; then the
base is quantised, and the adapters run unmerged, or are fused with it (their blocks quantised,
too), or LoRA is merged in float32 and the result quantised, as other tools do.
decode: greedy tokens on this CPU, by turns.
compiled: the token loop of two layers of Llama-3.2-1B and train steps of Llama-2-7B, compiled for
absent devices and not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from decode_programs import DecodeCase, loop_row
from harness import ROOT, arguments, at_least, origins, perturbed, write_part

import zflora_jax as zf
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.cli.options import load_config
from zflora_jax.core import trees
from zflora_jax.core.fields import override
from zflora_jax.core.presets import preset
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import (
    DataConfig,
    RunConfig,
    TrainConfig,
)
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.latency import contender, decode_turns, ratio, summary
from zflora_jax.experiments.plan import compile_step
from zflora_jax.experiments.setup import held_out
from zflora_jax.ops.quantized import bytes_of
from zflora_jax.parallel.targets import GIB, target
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.trainer import fresh_state, make_train_step

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
    """The quickstart's run, longer and scored on more rows, with another adapter."""
    run = load_config(str(ROOT / "configs" / "quickstart.py"), "get_config")
    longer = {"train.steps": 60, "eval.limit": 100, "eval.batch_size": 25}
    return override(dataclasses.replace(run, adapter=adapter), longer)


def trained(run: RunConfig, base: zf.Model) -> trees.Tree:
    """Adapters after the run's steps on the training split, in its order."""
    from zflora_jax.data.encoding import tokenize_examples
    from zflora_jax.data.mixture import load_mixture
    from zflora_jax.data.pipeline import eval_batches, one_sequence_a_row

    examples = load_mixture(run.data, "train", 8 * run.train.steps)
    encoded = tokenize_examples(examples, base.tokenizer, run.data, base.config.vocab_size)
    step = make_train_step(base.config, run.adapter, run.optim, run.train.steps)
    state = fresh_state(run, base)
    for batch in eval_batches(encoded, 8, run.data.bucket_lengths):
        state, _ = step(base.params, state, one_sequence_a_row(batch))
    return state.adapters


def scores(run: RunConfig, model: zf.Model) -> Row:
    """Held-out loss and accuracy of a model, dequantised because that is faster on a CPU."""
    found = evaluate(run, zf.dequantize_model(model), console=False)
    return {"loss": found["loss"], "accuracy": found["accuracy"]}


def quality() -> Iterable[Row]:
    """Rows of the base and of each method, by type of the base."""
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
    """Rows of the time per token on this CPU and the bytes of the parameters."""
    base = zf.load_model("smollm2-135m")
    adapter = ADAPTERS["zflora-minimal"]
    adapters = perturbed(base, adapter)
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


def compiled() -> Iterable[Row]:
    """Rows of token loops and of train steps, compiled for absent devices."""
    config = preset("llama-3.2-1b").replace(num_layers=2)
    methods = {
        "base": None,
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
    sections = {
        "quality": (_quality_table, QUALITY),
        "decode": (_decode_table, DECODE),
        "compiled": (_loop_table, COMPILED),
    }
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


QUALITY = """## Quality

Generated arithmetic, 100 held-out rows, SmolLM2-135M, adapters trained on the float32 base as the
quickstart does (60 steps of 8 rows). Loss is in nats per target token. The packaged model is itself
Q4_1, so other types round its weights a second time.

- unmerged: float32 adapters next to the quantised base.
- in one model: LoRA is merged into the float32 base and the sum quantised; the others are fused,
  with their blocks quantised as the base is.
"""
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


def _quality_table(row: Row) -> Row:
    return {
        "model": row["method"],
        "base": row["kind"],
        "loss, unmerged": f"{row['beside']:.4f}" if "beside" in row else "-",
        "loss, in one model": f"{row['loss']:.4f}",
        "accuracy, in one model": f"{row['accuracy']:.2f}",
    }


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
    parts = ("quality", "decode", "compiled")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=9, help="turns of decode")
    parser.add_argument("--tokens", type=int, default=48, help="generated tokens of decode")
    args = parser.parse_args()
    at_least(parser, args, repeats=1, tokens=2)
    made = {
        "quality": quality,
        "decode": lambda: decode(args.repeats, args.tokens),
        "compiled": compiled,
    }
    for part in args.parts:
        rows = []
        for row in made[part]():
            print(row, flush=True)
            rows.append(row)
        write_part(args.out, part, rows, page)


if __name__ == "__main__":
    main()
