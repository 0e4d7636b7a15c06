"""`zflora plan` against the compiler: bytes per device of a train step at the shapes of
Llama-3.2-1B and Llama-2-7B.

Command: python benchmarks/plan.py     (about 3 minutes on 2 CPU cores; no weights, nothing is run)
Writes results/plan.json and .md. 8 virtual CPU devices, 16 rows of 1024 tokens, rank 32, chunks of
1024 logits. XLA's CPU compiler keeps float32 copies of some bfloat16 arrays, so float32 is the
fairer comparison.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.compiled_plan import compiled
from zflora_jax.experiments.planner import memory_plan
from zflora_jax.parallel.targets import GIB
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

MODELS = ("llama-3.2-1b", "llama-2-7b")
FSDP = {"mesh.fsdp": 8}
CASES: tuple[dict[str, Any], ...] = (
    FSDP,
    FSDP | {"adapter.method": "lora"},
    FSDP | {"train.remat": "block"},
    FSDP | {"train.dtype": "bfloat16"},
    FSDP | {"train.dtype": "bfloat16", "train.remat": "block"},
    FSDP | {"data.grad_accum_steps": 2},
    {"mesh.data": 8},
    {"mesh.fsdp": 4, "mesh.tensor": 2},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    {"mesh.tensor": 8, "data.batch_size": 4},
)


def measure() -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        base = RunConfig(
            model=model,
            adapter=AdapterConfig("zflora-minimal", rank=32),
            data=DataConfig(batch_size=16, bucket_lengths=(1024,)),
            train=TrainConfig(steps=100, dtype="float32", loss_chunk=1024),
            mesh=MeshConfig(),
        )
        for changes in CASES:
            run, shape = override(base, changes), preset(model)
            planned, found = memory_plan(run, shape)["bytes_per_device"], compiled(run, shape)
            row = {
                "model": model,
                "changes": " ".join(f"{key}={value}" for key, value in changes.items()),
                "planned": planned,
                "compiled": found,
                "ratio": planned["total"] / found["total"],
                "stored ratio": stored(planned) / found["arguments"],
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def stored(planned: dict[str, int]) -> int:
    """Bytes of what a device holds between steps."""
    return sum(planned[name] for name in ("base", "adapters", "optimizer"))


def page(result: dict[str, Any]) -> str:
    ratios = [row["ratio"] for row in result["rows"]]
    shown = [
        {
            "model": row["model"],
            "changes": row["changes"],
            "planned": f"{row['planned']['total'] / GIB:.2f}",
            "of it stored": f"{stored(row['planned']) / GIB:.2f}",
            "compiled": f"{row['compiled']['total'] / GIB:.2f}",
            "of it arguments": f"{row['compiled']['arguments'] / GIB:.2f}",
            "planned / compiled": f"{row['ratio']:.2f}",
        }
        for row in result["rows"]
    ]
    return f"""# `zflora plan` against the compiler

GiB per device of one train step. zflora-minimal r=32 unless another method is named, float32, 16
rows of 1024 tokens (4 under tensor=8), chunks of 1024 logits, 8 virtual CPU devices. XLA's CPU
compiler keeps float32 copies of some bfloat16 arrays.

{markdown_table(shown, list(shown[0]))}

planned / compiled: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to
{max(ratios):.2f}.

{origin_line(result["environment"])}
"""


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    result = {"rows": measure(), "environment": environment()}
    write_result("results/plan", result, page(result))


if __name__ == "__main__":
    main()
