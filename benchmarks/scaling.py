"""Weak scaling on paper: bytes that the compiled train step moves between devices, per device and
step, against the size of the mesh.

Command: python benchmarks/scaling.py
(about 10 minutes on 2 CPU cores; no weights, nothing is run)
Writes results/scaling.json and docs/scaling.md: for the shapes of Llama-3.2-1B and Llama-2-7B, 2
rows of 512 tokens a device, float32, zflora-minimal r=32, the collectives of the HLO that XLA
compiles for virtual CPU devices, counted with their loops' trip counts, beside a formula.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.model_config import LlamaConfig, preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments.compiled_plan import compiled_step
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.provenance import environment
from zflora_jax.reporting.tables import markdown_table

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
WIDTH = {
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "bf16": 2,
    "f16": 2,
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f64": 8,
    "s64": 8,
}
ROWS, LENGTH = 2, 512  # a device
MESHES = [MeshConfig(fsdp=n) for n in (2, 4, 8)] + [
    MeshConfig(data=8),
    MeshConfig(tensor=4),
    MeshConfig(fsdp=4, tensor=2),
]
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[([^\]]*)\](?:, device_ids=\(.*?\))?"
    r" \{([^}]*)\})"
)


def collectives(text: str) -> Counter[str]:
    """Kind -> bytes that one device sends in one run of the HLO module `text`: a ring's cost of
    each collective, times its loops' trip counts.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def cost(computation: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for line in bodies.get(computation, []):
            if match := _COLLECTIVE.search(line):
                total[match[2]] += _sent(match[2], match[1], line)
            trips = (
                int(found[1]) if (found := re.search(r"known_trip_count[^\d]*(\d+)", line)) else 1
            )
            called = re.findall(
                r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)", line
            )
            called += (
                re.findall(r"%([\w.-]+)", found[1])
                if (found := re.search(r"branch_computations=\{([^}]*)\}", line))
                else []
            )
            if " while(" in line or " conditional(" in line or " call(" in line:
                for callee in called:
                    total.update({kind: trips * size for kind, size in cost(callee).items()})
        return total

    return cost(entry)


def _sent(kind: str, shapes: str, line: str) -> int:
    size = sum(
        math.prod(map(int, dims.split(","))) * WIDTH[dtype] if dims else WIDTH[dtype]
        for dtype, dims in _ARRAY.findall(shapes)
        if dtype in WIDTH
    )
    if kind == "collective-permute":
        return size
    members = _members(line)
    if members <= 1:
        return 0
    share = (members - 1) / members
    return int(
        {
            "all-gather": share,
            "reduce-scatter": members - 1,
            "all-reduce": 2 * share,
            "all-to-all": share,
        }[kind]
        * size
    )


def _members(line: str) -> int:
    """How many devices take part in a collective, by whichever way its line says so."""
    found = _GROUPS.search(line)
    if found is None:
        raise ValueError(
            "no replica groups that this script can read:"
            f" {line[line.find('replica_groups') :][:120]}"
        )
    count, listed, mesh, axes = found.groups()
    if count or listed:
        return int(count) if count else len(listed.split(","))
    sizes = dict(part.replace("'", "").split("=") for part in mesh.split(","))
    return math.prod(int(sizes[axis.strip().strip("'")]) for axis in axes.split(","))


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
    found = collectives(compiled_step(run, preset(name)).as_text())
    row = {
        "model": name,
        "mesh": f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}",
        "devices": devices,
        "tokens per step": ROWS * LENGTH * mesh.row_parts,
    }
    row |= {f"{kind}, MB": round(found[kind] / 1e6, 1) for kind in KINDS if found[kind]}
    return row | {
        "sum, MB": round(sum(found.values()) / 1e6, 1),
        "formula, MB": round(formula(preset(name), adapter, mesh) / 1e6, 1),
    }


def page(result: dict[str, Any]) -> str:
    env, rows = result["environment"], result["rows"]
    names = [
        *("model", "mesh", "devices", "tokens per step"),
        *(f"{kind}, MB" for kind in KINDS),
        *("sum, MB", "formula, MB"),
    ]
    columns = [name for name in names if any(name in row for row in rows)]
    return f"""# Weak scaling on paper

Bytes that the compiled train step moves between devices, per device and step, for several meshes.

Shapes of the models named, no weights, zflora-minimal r=32, float32, {ROWS} rows of {LENGTH} tokens
per device, chunks of 256 logits. mesh: data x fsdp x tensor. The bytes are counted in the HLO that
XLA compiles for virtual CPU devices. A ring of n devices sends (n-1)/n of the result of an
all-gather, n-1 times the result of a reduce-scatter, and 2 (n-1)/n of the size of an all-reduce.
All of it is in float32, since the CPU compiler widens bfloat16 kernels before it gathers them; a
bfloat16 base halves everything except the gradients. Other compilers may choose other collectives,
and overlap them with computation.

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
backward pass appears to sum the gradients of q, k and v, and of gate and up, one by one.

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
