"""Traffic between devices: bytes that the compiled train step moves between devices, per device and
step, against the size of the mesh.

Command: python benchmarks/scaling.py
(about 10 minutes on 2 CPU cores; no weights, nothing is run)
Writes results/scaling.json and docs/scaling.md: for the shapes of Llama-3.2-1B and Llama-2-7B, 2
rows of 512 tokens for each device along data x fsdp, float32, zflora-minimal r=32, the collectives
of the HLO that XLA compiles for virtual CPU devices, counted with their loops' trip counts, beside
a formula.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.compiled_plan import compiled_step
from zflora_jax.parallel.program_text import COLLECTIVES, Program
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.tables import markdown_table

ROWS, LENGTH = 2, 512  # a device
MESHES = [MeshConfig(fsdp=n) for n in (2, 4, 8)] + [
    MeshConfig(data=8),
    MeshConfig(tensor=4),
    MeshConfig(fsdp=4, tensor=2),
]


def formula(config: LlamaConfig, adapter: AdapterConfig, mesh: MeshConfig) -> int:
    """Bytes a device sends per step by hand: under fsdp the kernels of every layer twice (forward
    and backward), the table of tokens once, as the head; gradients of the adapters summed over the
    rows' devices; under tensor the residual stream, twice a layer in each pass.
    """
    rows, width = mesh.row_parts, 4
    layer = sum(math.prod(a + b) for a, b in kernel_shapes(config).values())
    head = config.vocab_size * config.hidden_size
    share = (mesh.fsdp - 1) / mesh.fsdp
    gathered = share * width * (2 * config.num_layers * layer + head) / mesh.tensor
    gradients = (
        2 * (rows - 1) / rows * 4 * sum(map(math.prod, adapter_shapes(config, adapter).values()))
    )
    stream = ROWS * LENGTH * config.hidden_size * width
    summed = 2 * (mesh.tensor - 1) / mesh.tensor * 4 * config.num_layers * stream
    return int(gathered + gradients + summed)


def measure(name: str, mesh: MeshConfig) -> dict[str, Any]:
    adapter = AdapterConfig("zflora-minimal", rank=32)
    devices = mesh.devices
    data = DataConfig(batch_size=ROWS * mesh.row_parts, bucket_lengths=(LENGTH,))
    run = RunConfig(model=name, adapter=adapter, data=data, train=TrainConfig(), mesh=mesh)
    found = Program(compiled_step(run, preset(name)).as_text()).collectives()
    row = {
        "model": name,
        "mesh": f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
        "devices": devices,
        "tokens per step": ROWS * LENGTH * mesh.row_parts,
    }
    row |= {f"{kind}, MB": round(found[kind] / 1e6, 1) for kind in COLLECTIVES if kind in found}
    return row | {
        "sum, MB": round(sum(found.values()) / 1e6, 1),
        "formula, MB": round(formula(preset(name), adapter, mesh) / 1e6, 1),
    }


def page(result: dict[str, Any]) -> str:
    env, rows = result["environment"], result["rows"]
    names = [
        *("model", "mesh", "devices", "tokens per step"),
        *(f"{kind}, MB" for kind in COLLECTIVES),
        *("sum, MB", "formula, MB"),
    ]
    columns = [name for name in names if any(name in row for row in rows)]
    return f"""# Traffic between devices

Bytes that the compiled train step moves between devices, per device and step, for several meshes.

Shapes of the models named, no weights, zflora-minimal r=32, float32, {ROWS} rows of
{LENGTH} tokens for each device along data x fsdp, chunks of 256 logits. mesh: data x fsdp x
tensor. The bytes are counted in the HLO that XLA compiles for virtual CPU devices. A ring of n
devices sends (n-1)/n of the result of an all-gather, n-1 times the result of a reduce-scatter, and
2 (n-1)/n of the size of an all-reduce. All of it is in float32, since the CPU compiler widens
bfloat16 kernels before it gathers them; a bfloat16 base halves everything except the gradients.
Other compilers may choose other collectives, and overlap them with computation.

{markdown_table(rows, columns)}

The formula, in bytes, with w = 4 for a float32 base and n = data x fsdp:

- fsdp: (fsdp-1)/fsdp x w x (2 x layers x kernels of a layer + vocabulary x width) / tensor. Both
  passes gather the kernels of each layer. The head is gathered once, ahead of the chunks of logits;
  embeddings are looked up in the divided table.
- gradients: 2 (n-1)/n x 4 x the parameters that the adapter stores. No gradient of the base is
  formed, so none is moved.
- tensor: 2 (tensor-1)/tensor x 4 x layers x rows x length x width x w. Both passes sum the residual
  stream after attention and MLP.

Under tensor, about 1.8 times the formula is moved, which is the ratio of 7 sums per layer to 4: the
CPU's compiler sums the gradients of q, k and v, and of gate and up, one by one. Those of TPUs and
GPUs add them before the devices do, so there the formula holds (results/target_variants.md).

With fixed rows per device, the bytes that fsdp moves per device tend to a constant (each device
gathers the model twice, on any number of devices). Tokens per second scale with the devices as long
as that traffic hides behind the computation on a device's own rows.

Command: `{env["command"]}`; commit {env["commit"]}; jax {env["jax"]}; {env["date"]}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-2-7b"])
    args = parser.parse_args()
    rows = list[dict[str, Any]]()
    result = {
        "rows": rows,
        "rows_per_device": ROWS,
        "length": LENGTH,
        "environment": environment(),
    }
    for name in args.models:
        for mesh in MESHES:
            rows.append(measure(name, mesh))
            print(json.dumps(rows[-1]), flush=True)
            write_json("results/scaling.json", result)
    atomic_write("docs/scaling.md", page(result).encode())


if __name__ == "__main__":
    main()
