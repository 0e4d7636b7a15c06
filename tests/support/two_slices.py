"""Compiles a train step for two TPU slices, without a device, and checks what crosses between them.

Run as a script, with the variables that libtpu needs.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc

from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.model_config import preset
from zflora_jax.core.run_config import MeshConfig, OptimConfig
from zflora_jax.parallel.sharding import batch_sharding, make_mesh, shardings, state_shardings
from zflora_jax.training.trainer import init_state, make_train_step

ADAPTER = AdapterConfig("zflora-minimal", rank=32)
CONFIG = preset("tiny").replace(
    dtype="bfloat16",
    hidden_size=256,
    num_layers=1,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=512,
    vocab_size=512,
)


def text_of_the_step(mesh: jax.sharding.Mesh) -> str:
    """The train step as the compiler writes it down."""

    def tree(shapes, dtype):
        return trees.unflatten({n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()})

    def put(values, where):
        return jax.tree.map(lambda x, at: x.update(sharding=at), values, where)

    params = tree(param_shapes(CONFIG), jnp.bfloat16)
    adapters = tree(adapter_shapes(CONFIG, ADAPTER), jnp.float32)
    state = jax.eval_shape(lambda a: init_state(a, OptimConfig(), 20), adapters)
    where = state_shardings(state, mesh)
    rows = {
        name: jax.ShapeDtypeStruct((16, 128), dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("tokens", jnp.int32), ("loss_mask", bool), ("segments", jnp.int32))
    }
    step = make_train_step(CONFIG, ADAPTER, OptimConfig(), 20, 1, 64, where)
    with jax.set_mesh(mesh):
        lowered = step.lower(put(params, shardings(params, mesh)), put(state, where), rows)
        return lowered.compile().as_text()


def main() -> None:
    topology = get_topology_desc(
        platform="tpu", topology_name="v5e:2x4", chips_per_host_bounds=(2, 4, 1), num_slices=2
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2, slices=2), topology.devices)
    assert [{d.slice_index for d in part.ravel()} for part in mesh.devices] == [{0}, {1}]
    text = text_of_the_step(mesh)
    # What stays in a slice has replica groups of its 8 devices; what crosses is a transfer by the
    # host, which names its kind.
    for group in re.findall(r"replica_groups=\{\{([\d,{}]*)\}\}", text):
        assert max(int(n) for n in re.findall(r"\d+", group)) < 8
    sends = [line for line in text.splitlines() if re.search(r"= .* send\(", line)]
    kinds = {re.search(r'transfer_type="(\w+)"', line)[1] for line in sends}
    assert kinds == {"ALL_REDUCE"}, kinds
    sent = sum(
        int(np.prod([int(n) for n in re.search(r"= \(\w+\[([\d,]*)\]", line)[1].split(",") if n]))
        for line in sends
    )
    own = sum(int(np.prod(s)) for s in adapter_shapes(CONFIG, ADAPTER).values())
    # Scalars are sent as tiles.
    assert sent <= own + 128 * len(sends), (sent, own)
    print("ALL_REDUCE", len(sends), sent, own)


if __name__ == "__main__":
    main()
