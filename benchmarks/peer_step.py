"""A LoRA step beside that of a peer, google-tunix, compiled for the same absent TPU and not run.

Command: benchmarks/peer_step.sh DIR     (an hour on 2 CPU cores; DIR gets an environment, 2 GB)
Llama-3.2-1B on a v5e-8, rank 32 on all projections, fsdp = 8, a row of 2048 tokens per device. The
peer's step is that of its PeftTrainer with qwix's LoRA. Writes results/peer_step.json and .md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from accelerators import LENGTH, RANK, train_run
from flax import nnx
from harness import arguments, origins, write_part
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from program_text import COLLECTIVES, Program
from tunix.models.llama3 import model as llama
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from zflora_jax.core.fields import override
from zflora_jax.core.presets import preset
from zflora_jax.experiments.plan import compile_step
from zflora_jax.parallel.targets import GIB, target
from zflora_jax.reporting.tables import markdown_table

WHERE = target("tpu:v5e:2x4")
PROJECTIONS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PEER, OURS = r"attention(?!.*einsum)", r"splash|attention"
OUTSIDE = "outside attention"


def peer_step(remat: str) -> Any:
    """The peer's compiled step. remat: A name of its RematConfig."""
    mesh = Mesh(np.array(WHERE.devices()).reshape(-1, 1), ("fsdp", "tp"))
    config = replace(llama.ModelConfig.llama3p2_1b(), remat_config=llama.RematConfig[remat])
    trainers: list[PeftTrainer] = []

    def build() -> Any:
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
        lora = qwix.LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=2.0 * RANK)
        model = qwix.apply_lora_to_model(model, lora, **model.get_model_input(), rngs=nnx.Rngs(0))
        trainers.append(PeftTrainer(model, optax.adamw(1e-3), TrainingConfig(eval_every_n_steps=9)))
        return model, trainers[0].optimizer

    llama.shard = lambda x, axes: x  # there are no arrays yet
    graph, state = nnx.split(nnx.eval_shape(build))  # its shard() does nothing where jax has a CPU
    llama.shard = lambda x, axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))

    def placed(x: Any, spec: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec if isinstance(spec, P) else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(state: Any, batch: Any) -> Any:
        both = nnx.merge(graph, state)
        loss, _, norm = trainers[0].create_train_step_fn()(*both, batch)
        return loss, norm, nnx.state(both)

    kinds = {"input_tokens": "int32", "positions": "int32", "input_mask": "bool"}
    shapes = {x: jax.ShapeDtypeStruct((mesh.size, LENGTH), kind) for x, kind in kinds.items()}
    shapes["attention_mask"] = jax.ShapeDtypeStruct((mesh.size, LENGTH, LENGTH), "bool")
    batch = {name: placed(x, P("fsdp")) for name, x in shapes.items()}
    state = jax.tree.map(placed, state, nnx.get_partition_spec(state))
    with mesh:
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def rows() -> Iterator[dict[str, Any]]:
    """A row per step: bytes, the TPU compiler's cycles, collectives and bytes sent of a device."""
    cases = [("tunix, LoRA", remat, PEER, False) for remat in ("NONE", "DECODER")]
    ways = [(x, OURS, y) for y in (True, False) for x in ("none", "dots", "block")[: 2 + y]]
    cases += [(method, *way) for method in ("lora", "zflora-minimal") for way in ways]
    for name, remat, attention, scan in cases:
        run = None if attention == PEER else train_run("llama-3.2-1b", name, remat, WHERE)
        run = run and override(run, {"train.scan_layers": scan})
        made = compile_step(run, preset(run.model), WHERE)[1] if run else peer_step(remat)
        program, memory = Program(made.as_text()), made.memory_analysis()
        cycles = [(op, op.cycles * times / 1e6) for op, times in program.runs()]
        inner, inside = re.compile(rf'op_name="[^"]*({attention})'), program.runs(fused=True)
        yield {
            "step": name,
            "remat": remat.lower(),
            "layers": "in a loop" if scan else "apart",
            "arguments, GiB": memory.argument_size_in_bytes / GIB,
            "temporaries, GiB": memory.temp_size_in_bytes / GIB,
            "cycles, M": sum(n for _, n in cycles),
            OUTSIDE: sum(n for op, n in cycles if not inner.search(op.line)),
            "collectives": sum(n for op, n in inside if op.code.split("-start")[0] in COLLECTIVES),
            "sent, GB": sum(program.collectives().values()) / 1e9,
        }


def page(result: Mapping[str, Any]) -> str:
    """Returns the page in Markdown."""
    tunix, *ours = (result["steps"][i] for i in (0, 6, 11))
    of = [f"{step['cycles, M'] / tunix['cycles, M']:.2f}" for step in ours]
    out = [f"{step[OUTSIDE]:.0f}" for step in (tunix, *ours)]
    return f"""# A train step beside a peer's

**With `train.scan_layers=False` and remat dots, our LoRA step takes {of[0]} of the cycles of
google-tunix's without remat, and zflora-minimal's {of[1]}; flash attention, which the estimate
leaves out, adds 0.04 or more to both.** Outside attention tunix needs {out[0]} million cycles, LoRA
here {out[1]} and zflora-minimal {out[2]}.

{markdown_table(result["steps"], list(tunix))}

Llama-3.2-1B on a v5e-8, rank {RANK}, fsdp = 8, {LENGTH} tokens per device. Compiled, not run;
cycles: the TPU compiler's estimate for a device, without waiting for links. Our flash attention
needs 12 million or more for its products alone. tunix has none; its logits, softmax, LoRA and
Adam's moments are bfloat16, ours float32. remat: dots and block here, decoder (a layer) there.

{origins(result, "steps")}
"""


if __name__ == "__main__":
    args = arguments(__doc__, "peer_step").parse_args()
    write_part(args.out, "steps", list(rows()), page)
