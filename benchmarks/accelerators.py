"""Decode and training compiled for absent TPUs and GPUs: kernels, bytes, temporaries, a roofline.

Command: python benchmarks/accelerators.py [--parts decode train together] [--models M ...]
(seconds for a token loop, one to two minutes for a train step on 2 CPU cores; no weights, nothing
runs; extras target-tpu and target-cuda)
Writes results/accelerators.json and .md. A part that is not named keeps its rows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from harness import RESULTS, arguments, origins, write_part
from plots import bars

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.parallel.targets import GIB, Target, target
from zflora_jax.reporting.tables import markdown_table

BASE, UNMERGED = "base", "lora unmerged"
CHIPS = ("tpu:v5e:1x1", "tpu:v6e:1x1", "cuda:h100:1")
SLICES = ("tpu:v5e:2x4", "cuda:h100:8")
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
LAYERS, BATCHES, RANKS = 2, (1, 8), (16, 32, 64, 128)  # of decode
LENGTH, RANK = 2048, 32  # of train steps
STEPS = (("zflora-minimal", "dots"), ("zflora-minimal", "block"), ("lora", "dots"))
TOGETHER = ("smollm2-135m", "llama-3.2-1b"), (128, 512), (1, 4, 16)  # models, tokens, runs
Row = dict[str, Any]


def decode_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yields for each target, model and batch the base, unmerged LoRA at the first rank, and each
    method that widens, fused, at every rank: see `decode_programs.loop_row`.
    """
    from decode_programs import DecodeCase, loop_row

    wide = [name for name, method in METHODS.items() if method.widens]
    adapters: list[tuple[str, AdapterConfig | None]] = [(BASE, None)]
    adapters += [(UNMERGED, AdapterConfig("lora", rank=RANKS[0]))]
    adapters += [(name, AdapterConfig(name, rank=rank)) for name in wide for rank in RANKS]
    found = dict[Any, Row]()
    for where in map(target, CHIPS):
        for model in args.models:
            config = preset(model).replace(num_layers=LAYERS)
            for batch in BATCHES:
                for label, adapter in adapters:
                    case = DecodeCase(config, adapter, batch)
                    # Ranks that are padded to the same widths have the same program.
                    program = where, case.packed(where).stored, case.unmerged, batch
                    if program not in found:
                        found[program] = loop_row(case, where)
                    row = {"target": where.name, "model": model, "layers": config.num_layers}
                    row |= {"batch": batch, "label": label, "rank": adapter and adapter.rank}
                    yield row | found[program]


def train_run(model: str, method: str, remat: Any, where: Target) -> RunConfig:
    """A run with one row of LENGTH tokens on each device of a target, divided by fsdp."""
    devices = len(where.devices())
    return RunConfig(
        model=model,
        adapter=AdapterConfig(method, rank=RANK),
        data=DataConfig(batch_size=devices, bucket_lengths=(LENGTH,)),
        train=TrainConfig(dtype="bfloat16", remat=remat),
        mesh=MeshConfig(fsdp=devices),
    )


def train_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yields for each target and model the compiled train steps of two remat policies with
    zflora-minimal, and of LoRA: see `experiments.plan.compile_step`; "kernels" and "cycles" of a
    step; "collectives", type -> bytes that a device sends; "roofline".
    """
    from program_text import BETWEEN_SLICES, Program, kernels

    from zflora_jax.experiments.plan import compile_step
    from zflora_jax.experiments.roofline import roofline

    for where in map(target, SLICES):
        for model in args.models:
            for method, remat in STEPS:
                run, config = train_run(model, method, remat, where), preset(model)
                found, step = compile_step(run, config, where)
                row = {"model": model, "method": method, "remat": remat, **found}
                if step is None:
                    row["needs"] = needed(row.pop("refused"))
                else:
                    sent = (program := Program(step.as_text())).collectives()
                    link = sum(sent.values()) - sent.get(BETWEEN_SLICES, 0)
                    row["kernels"] = sum(n for op, n in program.runs() if kernels([op]))
                    row["cycles"] = sum(op.cycles * n for op, n in program.runs())
                    row["collectives"] = sent
                    row["roofline"] = roofline(run, config, where.chip, link)
                yield row


def together_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yields for each target and model the step of one row of each of several runs, which are one
    program: "kernels" of a run; "cycles" of a run, the TPU compiler's estimate, and "gain", how
    many times fewer than alone; "arguments" and "temporaries" of all, in bytes.
    """
    import jax
    from program_text import Program, kernels

    from zflora_jax.experiments.step_shapes import step_arguments
    from zflora_jax.parallel.compile_cache import no_compile_cache
    from zflora_jax.parallel.sharding import make_mesh
    from zflora_jax.training.trainer import TrainStep, make_steps

    for where, model, tokens in product(map(target, CHIPS[::2]), *TOGETHER[:2]):
        run = train_run(model, "zflora-minimal", "block", where)
        run = replace(run, data=replace(run.data, bucket_lengths=(tokens,)))
        mesh, step = make_mesh(run.mesh, where.devices()), TrainStep.of(run, preset(model))
        params, state, batch = step_arguments(run, preset(model), mesh)
        step, alone = replace(step, config=run.train.applied_to(preset(model))), 0.0
        for runs in TOGETHER[2]:
            steps = jax.jit(partial(make_steps, [step] * runs, None), donate_argnums=1)
            with jax.set_mesh(mesh), no_compile_cache():
                made = steps.lower(params, [state] * runs, [batch] * runs).compile()
            program, memory = [*Program(made.as_text()).runs()], made.memory_analysis()
            cycles = sum(op.cycles * times for op, times in program) / runs
            alone = alone or cycles
            yield {
                "target": where.name,
                "model": model,
                "tokens of a run": tokens,
                "runs": runs,
                "kernels of a run": sum(n for op, n in program if kernels([op])) // runs,
                "cycles of a run, millions": cycles / 1e6 or None,
                "gain": alone / cycles if cycles else None,
                "arguments, GiB": memory.argument_size_in_bytes / GIB,
                "temporaries, GiB": memory.temp_size_in_bytes / GIB,
            }


def needed(refused: str) -> int:
    """The bytes that a TPU's compiler names where a program does not fit: "Used 20.11G of 15.75G
    hbm", or "HLO temporaries (46.96G) exceeds available HBM".
    """
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])(?: of|\) exceeds)", refused)
    assert found, refused
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def _decode_line(case: tuple[Any, ...], rows: list[Row]) -> Row:
    """One row of the page: the base, LoRA, and the worst of the fused models."""
    (base,), (lora,) = ([r for r in rows if r["label"] == name] for name in (BASE, UNMERGED))
    fused = [row for row in rows if row["label"] not in (BASE, UNMERGED)]
    more = max(row["temporaries"] for row in fused) - base["temporaries"]

    def between(values: list[Any], form: str = "") -> str:
        return " to ".join(dict.fromkeys(f"{f(values):{form}}" for f in (min, max)))

    def time(some: list[Row]) -> str:
        times = [x["floor_share"] * x["read_bytes"] for x in [base, *some] if "floor_share" in x]
        return between([x / times[0] for x in times[1:]], ".2f") if times else "-"

    return dict(zip(("target", "model", "layers", "batch"), case, strict=True)) | {
        "kernels: base": base["kernels"],
        "fused": between([row["kernels"] for row in fused]),
        "LoRA unmerged": lora["kernels"],
        "copies, fused": sum(row["copies"] for row in fused),
        "arguments, fused / base": f"{max(r['arguments'] for r in fused) / base['arguments']:.3f}",
        "temporaries, base, MiB": f"{base['temporaries'] / 2**20:.1f}",
        "fused more, MiB": f"{more / 2**20:.1f}",
        "time: base / floor": f"{base['floor_share']:.2f}" if "floor_share" in base else "-",
        "zflora-minimal / base": time([row for row in fused if row["label"] == "zflora-minimal"]),
        "all fused / base": time(fused),
        "LoRA unmerged / base": time([lora]),
    }


def _train_line(row: Row) -> Row:
    line = {key: row[key] for key in ("target", "model", "method", "remat")}
    if "needs" in row:
        return line | {"total, GiB": f"{row['needs'] / GIB:.2f} (refused)"}
    sizes, estimate = row["bytes"], row["roofline"]
    return line | {
        "arguments, GiB": f"{sizes['arguments'] / GIB:.2f}",
        "temporaries, GiB": f"{sizes['temporaries'] / GIB:.2f}",
        "total, GiB": f"{sizes['total'] / GIB:.2f}",
        "kernels": row["kernels"],
        "cycles, millions": f"{row['cycles'] / 1e6:.0f}" if row.get("cycles") else "-",
        "attention": row["attention"]["kernel"],
        "sent, GB": f"{sum(row['collectives'].values()) / 1e9:.2f}",
        "at least, ms": f"{1e3 * estimate['step_s']:.0f}",
        "bound by": estimate["bound"],
    }


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in result.get("decode", []):
        case = tuple(row[key] for key in ("target", "model", "layers", "batch"))
        cases.setdefault(case, []).append(row)
    decode = [_decode_line(case, rows) for case, rows in cases.items()]
    train = [_train_line(row) for row in result.get("train", [])]
    together = result.get("together", [])
    return f"""# Decode and training on TPUs and GPUs, compiled and not run

libtpu and XLA's CUDA plugin compile programs for absent devices. Nothing on this page was timed.

## Decoding one token

Prompts of 128 tokens, bfloat16. Fused models are ffba, zflora-minimal and zflora-uniform at each
rank; a column shows the range of all of them, or their highest value.

- kernels: operations of the token loop that run a kernel.
- copies: weights, embeddings or caches that decode copies for every token, when fused.
- arguments, temporaries: bytes of the whole program, as the compiler plans them.
- time: the sum of the TPU compiler's estimates for the operations, and its copies started ahead;
  nothing between operations. floor: the least time, to read weights and cache.

{markdown_table(decode, list(decode[0])) if decode else "Not compiled."}

{origins(result, "decode")}

## A train step

One row of {LENGTH} tokens per device, rank {RANK}, bfloat16, the base divided over all devices by
fsdp.

- arguments, temporaries, total: bytes per device, as the compiler plans them.
- cycles: the TPU compiler's estimate, without its flash attention and without waiting for links.
- sent: bytes that a device sends per step, from the collectives of the compiled program.
- at least: a roofline from published rates, and what bounds it.

{markdown_table(train, list(max(train, key=len))) if train else "Not compiled."}

{origins(result, "train")}

## Runs that train together

One step of several runs over one base (zflora-minimal, rank {RANK}, bfloat16, remat block, one row
each): `zf.sweep(..., together=N)`. cycles: the TPU compiler's estimate per run; gain: cycles
of a single run / these cycles. arguments, temporaries: of all runs.

{markdown_table(together, list(together[0])) if together else "Not compiled."}

{origins(result, "together")}
"""


def picture(result: Mapping[str, Any]) -> None:
    """Draws results/kernels.png: the kernels of a token of Llama-3.2-1B."""
    chips, shown = {"cuda:h100:1": "H100", "tpu:v5e:1x1": "TPU v5e"}, dict[str, float]()
    names = {"base": "base", "zflora-minimal": "zFLoRA, fused", "lora unmerged": "LoRA, unmerged"}
    for row in result.get("decode", []):
        first = row["rank"] in (None, 16) and row["batch"] == 1 and row["model"] == "llama-3.2-1b"
        if first and row["target"] in chips and row["label"] in names:
            shown[f"{chips[row['target']]}: {names[row['label']]}"] = row["kernels"]
    shown = dict(sorted(shown.items(), key=lambda item: (item[0].split(":")[0], item[1])))
    lora, fused = (
        [shown[f"{chip}: {kind}"] - shown[f"{chip}: base"] for chip in chips.values()]
        for kind in ("LoRA, unmerged", "zFLoRA, fused")
    )
    title = f"In two layers, unmerged LoRA adds {lora[0]} or {lora[1]} kernels per token,"
    title += f" fused zFLoRA at most {max(fused)}"
    label = "kernels per token: Llama-3.2-1B cut to 2 layers, batch 1; compiled, not run"
    bars(shown, RESULTS / "kernels", title, label=label)


def main() -> None:
    parser = arguments(__doc__, "accelerators")
    made = {"decode": decode_rows, "train": train_rows, "together": together_rows}
    parser.add_argument("--parts", nargs="+", choices=list(made), default=list(made))
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="presets")
    args = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")  # leaves the devices of this machine alone
    for part in args.parts:
        rows = []
        for row in made[part](args):
            print(row, flush=True)
            rows.append(row)
        result = write_part(args.out, part, rows, page)
    if "decode" in result:
        picture(result)


if __name__ == "__main__":
    main()
