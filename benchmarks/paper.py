"""What the paper's tables (configs/paper/tables.py) need: their train steps compiled for one H100,
eight H100 and a v5e-8, which are absent.

Command: python benchmarks/paper.py
(about half an hour on 2 CPU cores; no weights, nothing is run; needs the extras target-tpu and
target-cuda)
Writes results/paper_plan.json and .md.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from accelerators import roofline
from program_text import Program

from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import MeshConfig, RunConfig
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.plan import compile_step
from zflora_jax.parallel.targets import GIB, Target, target
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

TARGETS = ("cuda:h100", "cuda:h100:8", "tpu:v5e:2x4")
# Tables of one shape have one train step.
GROUPS = ("math", "summary")
METHOD = "zflora-minimal"


def tables() -> Any:
    """The module configs/paper/tables.py."""
    path = Path(__file__).parent.parent / "configs" / "paper" / "tables.py"
    spec = importlib.util.spec_from_file_location("paper_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_on(plan: Comparison, where: Target, accum: int) -> RunConfig:
    """The run of a table on all devices of a target, in `accum` micro-batches a step."""
    base, devices = plan.base, len(where.devices())
    data = replace(base.data, grad_accum_steps=accum)
    mesh = MeshConfig(fsdp=devices)
    return replace(base, adapter=plan.methods[METHOD], data=data, mesh=mesh)


def measure(plan: Comparison, where: Target) -> dict[str, Any]:
    """The fewest micro-batches with which a step fits, and what its compiler then plans."""
    config, devices = preset(plan.base.model), len(where.devices())
    accum, row = 1, {"table": plan.name, "target": where.name}
    while True:
        run = run_on(plan, where, accum)
        found, step = compile_step(run, config, where)
        needs = found.get("needs") or found["bytes"]["total"]
        if "needs" not in found and needs <= where.chip.memory:
            sent = sum(Program(step.as_text()).collectives().values())
            return row | {"micro_batches": accum, "needs": needs, **roofline(run, where, sent)}
        if run.data.micro_batch_size == devices:
            return row | {"micro_batches": None, "needs": needs}
        accum *= 2


def steps_of(plan: Comparison) -> int:
    """Training steps of a whole table: a short run a rate and one whole run, of each method."""
    short = len(plan.learning_rates) * (plan.pick_steps or 0)
    return len(plan.methods) * (short + plan.base.train.steps)


def _line(row: dict[str, Any], plans: dict[str, Comparison]) -> dict[str, Any]:
    line: dict[str, Any] = {key: row[key] for key in ("table", "target")}
    if row["micro_batches"] is None:
        return line | {"micro-batches": "does not fit", "GiB": f"{row['needs'] / GIB:.1f}"}
    plan, step = plans[row["table"]], row["step_s"]
    return line | {
        "micro-batches": row["micro_batches"],
        "GiB": f"{row['needs'] / GIB:.1f}",
        "a step, s": f"{step:.2f}",
        "bound by": row["bound"],
        "a run, min": f"{step * plan.base.train.steps / 60:.1f}",
        "the table, h": f"{step * steps_of(plan) / 3600:.1f}",
    }


def page(result: dict[str, Any]) -> str:
    plans = {plan.name: plan for plan in tables().get_sweep()}
    rows = list(result["rows"])
    # The steps of commonsense are those of math, of which there are more.
    rows += [
        r | {"table": r["table"].replace("math", "commonsense")}
        for r in rows
        if "math" in r["table"]
    ]
    rows.sort(key=lambda row: (row["table"], TARGETS.index(row["target"].removesuffix(":1"))))
    lines = [_line(row, plans) for row in rows]
    return f"""# What the paper's tables need

**Compiled for, not run.** The train steps of `configs/paper/tables.py`, {METHOD}, batches of 16
rows of the longest length (256 tokens, 2048 of the summary-dialogue tables), bfloat16, the base
divided over all devices by fsdp.

- micro-batches: `data.grad_accum_steps`, the fewest with which a step fits. GiB: of a device, as
  its compiler plans it.
- a step: at least, by the roofline from published rates, if every row is of the longest length. An
  estimate, no measurement: real steps take longer.
- a run: of one method at one rate. the table: five methods, each with three short runs that choose
  its rate and one whole run; scoring the tasks comes on top.

{markdown_table(lines, list(max(lines, key=len)))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--out", default="results/paper_plan")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # leaves a device that is there alone
    module, rows = tables(), list[dict[str, Any]]()
    result = {"rows": rows, "environment": environment()}
    for name in args.targets:
        for group in GROUPS:
            for size in module.MODELS:
                rows.append(measure(module.table(group, size), target(name)))
                print(rows[-1], flush=True)
                write_result(Path(args.out), result, page(result))


if __name__ == "__main__":
    main()
