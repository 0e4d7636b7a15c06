"""Training on a quantised base: as on its numbers, on any mesh; what a compiled step keeps of it;
loading, generation and the plan.
"""

import dataclasses

import jax
import numpy as np
import pytest
from support.grids import always
from support.models import tiny_model
from support.quantized import how, moved
from support.sharded import three_steps

from zflora_jax import ConfigError, forward, fuse, generate_tokens, load_base, load_model, preset
from zflora_jax.config import AdapterConfig, DataConfig, MeshConfig, QuantizeConfig, RunConfig
from zflora_jax.core import trees
from zflora_jax.core.model import fingerprint
from zflora_jax.experiments.plan import lowered_step, stored_bytes
from zflora_jax.nn.quantize_model import dequantize_model, quantize_model
from zflora_jax.ops.quantized import KINDS, bytes_of
from zflora_jax.parallel import sharding

# An even width on every device: see the flags of conftest.
ADAPTER = AdapterConfig("zflora-uniform", rank=8, alpha=9.0, extra_head_dim=32)
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}


def base(kind):
    """Every dimension of it 8 divides, and 32 those of groups."""
    wide = {"num_heads": 8, "num_kv_heads": 8, "head_dim": 32, "vocab_size": 264}
    model = tiny_model(**wide)
    return quantize_model(model, how(kind, embedding=kind))


@pytest.mark.parametrize("kind", always(KINDS, lambda kind: kind == "q4_1"))
def test_steps_are_those_on_the_numbers_on_any_mesh(kind):
    model = base(kind)
    wanted, adapters = three_steps(model, ADAPTER, MeshConfig(), std=0.0)
    assert wanted[2, 0] < wanted[0, 0]
    numbers, _ = three_steps(dequantize_model(model), ADAPTER, MeshConfig(), std=0.0)
    np.testing.assert_allclose(wanted, numbers, rtol=2e-5)
    for changes in {}, {"scan_layers": False, "grad_accum_steps": 2}:
        metrics, found = three_steps(model, ADAPTER, MeshConfig(2, 2, 2), std=0.0, **changes)
        np.testing.assert_allclose(metrics, wanted, rtol=2e-5)
        for name, leaf in trees.flatten(found).items():
            np.testing.assert_allclose(leaf, trees.flatten(adapters)[name], atol=2e-5, err_msg=name)


def test_fuse_and_decode_on_a_mesh_are_those_of_one_device():
    model = base("int4")
    adapters, prompts = moved(model, ADAPTER), [[5, 9, 77, 30], [8, 200, 31]]
    fused = fuse(model, ADAPTER, adapters)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2))
    divided = dataclasses.replace(model, params=sharding.shard(model.params, mesh))
    both = fuse(divided, ADAPTER, adapters)
    parts = trees.arrays(fused.params)
    for name, part in trees.arrays(both.params).items():
        np.testing.assert_array_equal(np.asarray(part), np.asarray(parts[name]), name)
    codes = trees.arrays(divided.params)["layers/mlp/gate/kernel/codes"]
    assert {s.data.size for s in codes.addressable_shards} == {codes.size // 4}
    tokens = np.asarray([prompts[0]], np.int32)
    wanted = np.asarray(forward(fused, tokens))
    found = np.asarray(forward(both, tokens))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    made = generate_tokens(fused, prompts, max_new_tokens=6)
    assert generate_tokens(both, prompts, max_new_tokens=6) == made


def test_a_directory_is_quantised_tensor_by_tensor_as_in_memory(base_dir):
    """On one device and on a mesh; what cannot be kept is refused."""
    wanted = quantize_model(load_model(base_dir), "int8")
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    for given in ({}, {"mesh": mesh}, {"scan_layers": False}):
        found = load_model(base_dir, quantize="int8", **given)
        assert fingerprint(found) == fingerprint(wanted)
    run = RunConfig(model=base_dir, quantize=QuantizeConfig("int8"))
    assert fingerprint(load_base(run)) == fingerprint(wanted)
    with pytest.raises(ConfigError, match=r"keeps the blocks of a \.gguf file"):
        load_model(base_dir, quantize="keep")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.soak  # of memory; numbers are above
def test_a_compiled_step_keeps_no_dequantised_base(kind):
    """With four layers more the temporaries grow by what the backward pass keeps, as beside a float
    base; not by the layers' numbers. (On a CPU codes of 4 bits become codes of 8.)
    """
    wide = preset("tiny").replace(**WIDE)

    def temporaries(layers, **quantize):
        run = RunConfig(
            data=DataConfig(batch_size=1, bucket_lengths=(32,)), quantize=QuantizeConfig(**quantize)
        )
        config, mesh = wide.replace(num_layers=layers), sharding.make_mesh(run.mesh)
        step = lowered_step(run, config, mesh).compile()
        return step.memory_analysis().temp_size_in_bytes

    float_base = tiny_model(**WIDE)
    layer = sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(float_base.params["layers"]))
    more = temporaries(8, kernels=kind) - temporaries(4, kernels=kind)
    plain = temporaries(8) - temporaries(4)
    assert more - plain < 1.2 * layer  # four layers' numbers would be 4 of it
    run = RunConfig(quantize=QuantizeConfig(kind))
    planned = stored_bytes(run, wide)["base"]
    held = quantize_model(float_base, QuantizeConfig(kind))
    assert planned == sum(bytes_of(leaf) for leaf in trees.flatten(held.params).values())
