"""Train steps of real sizes compiled for TPU slices and GPUs that are absent: memory, the largest
batch that fits, collectives, a roofline.

Command: python benchmarks/train_targets.py [--targets T ...] [--models M ...] [--short]
(one to two minutes a program on 2 CPU cores; no weights, nothing is run)
Writes results/train_targets.json and .md. bfloat16, rank 32, rows of 2048 tokens, fsdp over all
devices of the target, chunks of 256 logits.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.planner import bytes_per_device, shaped_config
from zflora_jax.experiments.target_plan import compiled_facts
from zflora_jax.parallel.targets import GIB, Target, target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

TARGETS = ("tpu:v5e:2x4", "tpu:v5p:2x2x1", "tpu:v6e:2x4", "cuda:h100:8")
MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-2-7b")
POLICIES = ("none", "dots", "block", "offload")
LENGTH, RANK = 2048, 32


def run_of(model: str, method: str, remat: Any, where: Target, rows: int) -> RunConfig:
    """A run with `rows` rows of LENGTH tokens on each device of a target, divided by fsdp."""
    devices = len(where.devices())
    return RunConfig(
        model=model,
        adapter=AdapterConfig(method, rank=RANK),
        data=DataConfig(batch_size=rows * devices, bucket_lengths=(LENGTH,)),
        train=TrainConfig(dtype="bfloat16", remat=remat),
        mesh=MeshConfig(fsdp=devices),
    )


def cases(
    targets: list[Target], models: list[str], short: bool
) -> Iterator[tuple[Target, str, str, str]]:
    """Every policy of the first model with zflora-minimal (if not `short`), two of the others;
    LoRA by one.
    """
    for where in targets:
        for model in models:
            every = model == models[0] and not short
            for remat in POLICIES if every else ("dots", "block"):
                yield where, model, "zflora-minimal", remat
            yield where, model, "lora", "dots"


def measure(where: Target, model: str, method: str, remat: str, short: bool) -> dict[str, Any]:
    """Compile one row a device, and estimate from it how many fit; of zflora-minimal with "dots"
    that many are compiled too, or fewer until they fit (if not `short`).
    """
    row: dict[str, Any] = {"target": where.name, "model": model, "method": method, "remat": remat}
    config = preset(model)
    run = run_of(model, method, remat, where, 1)
    try:
        found = compiled_facts(run, config, where)
    except jax.errors.JaxRuntimeError as error:
        return row | {"refused": str(error).splitlines()[0][:200]}
    flash = found["attention"]["kernel"] != "blocks"

    def formula(rows: int) -> int:
        run = run_of(model, method, remat, where, rows)
        return bytes_per_device(run, shaped_config(run, config), flash=flash)["total"]

    row |= {"formula": formula(1), "memory": where.chip.memory} | found
    scale = (found.get("needs") or found["bytes"]["total"]) / formula(1)
    fit = bisect_right(range(1, 1025), where.chip.memory, key=lambda n: formula(n) * scale)
    row["rows_that_fit"] = fit
    if (method, remat) == ("zflora-minimal", "dots") and fit > 1 and not short:
        rows, needs = fit, where.chip.memory + 1
        while rows > 1 and needs > where.chip.memory:
            more = compiled_facts(run_of(model, method, remat, where, rows), config, where)
            needs = more.get("needs") or more["bytes"]["total"]
            row["largest"] = {"rows": rows, "total": needs}
            rows = min(rows - 1, int(rows * where.chip.memory / needs))
    return row


def _line(row: dict[str, Any]) -> dict[str, Any]:
    line = {key: row[key] for key in ("target", "model", "method", "remat")}
    if "refused" in row:
        return line | {"total, GiB": "refused by the compiler"}
    if "needs" in row:
        return line | {
            "total, GiB": f"{row['needs'] / GIB:.2f} (refused)",
            "formula, GiB": f"{row['formula'] / GIB:.2f}",
        }
    sizes, line_of = row["bytes"], row["roofline"]
    step = line_of["step_s"]
    return line | {
        "arguments, GiB": f"{sizes['arguments'] / GIB:.2f}",
        "temporaries, GiB": f"{sizes['temporaries'] / GIB:.2f}",
        "total, GiB": f"{sizes['total'] / GIB:.2f}",
        "formula, GiB": f"{row['formula'] / GIB:.2f}",
        "formula / compiler": f"{row['formula'] / sizes['total']:.2f}",
        "rows that fit": row["rows_that_fit"],
        "compiled with": f"{row['largest']['rows']} rows, {row['largest']['total'] / GIB:.2f} GiB"
        if "largest" in row
        else "-",
        "attention": row["attention"]["kernel"],
        "sent, GB": f"{sum(row['collectives'].values()) / 1e9:.2f}",
        "at least, ms": f"{1e3 * step:.0f}",
        "bound by": line_of["bound"],
    }


def page(result: dict[str, Any]) -> str:
    rows = [_line(row) for row in result["rows"]]
    columns = list(max(rows, key=len))
    return f"""# Train steps, compiled for devices that are absent

**Compiled for, not run.** bfloat16, rank {RANK}, one row of {LENGTH} tokens on each device, the
base divided over all devices by fsdp, chunks of 256 logits. v5p:2x2x1 has 4 chips: it is sold as
v5p-8. A run that was stopped has the rows that it had come to.

- arguments, temporaries, total: bytes of a device as the compiler plans them. A TPU's compiler
  refuses a program that does not fit and names the bytes.
- formula: `zflora plan`'s own, with the attention kernel of the target.
- rows that fit: on each device, by the formula, scaled to the compiler's total of one row. An
  estimate. compiled with: the most of them that the compiler was seen to fit, and their total.
- sent: bytes that a device sends in a step, by the collectives of the compiled program.
- at least: the roofline of the step from published rates, and what bounds it. An estimate, no
  measurement.
- remat: what the backward pass keeps (`ops/remat.py`).

{markdown_table(rows, columns)}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--short", action="store_true", help="two policies, one row a device")
    parser.add_argument("--out", default="results/train_targets")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # leaves a device that is there alone
    rows = list[dict[str, Any]]()
    result = {"rows": rows, "environment": environment()}
    for case in cases([target(name) for name in args.targets], args.models, args.short):
        rows.append(measure(*case, args.short))
        print({k: v for k, v in _line(rows[-1]).items()}, flush=True)
        write_result(Path(args.out), result, page(result))


if __name__ == "__main__":
    main()
