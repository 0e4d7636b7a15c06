"""The train step and decoding lower for TPUs, on a machine without one."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.run_config import OptimConfig
from zflora_jax.inference.generation_config import Sampler
from zflora_jax.inference.program import DecodeProgram, packed
from zflora_jax.ops import attention
from zflora_jax.parallel.devices import named_device
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import init_state, make_train_step


@pytest.fixture(autouse=True)
def as_on_a_tpu(monkeypatch):
    """With its attention kernel."""
    monkeypatch.setattr(attention, "device_in_use", partial(named_device, "tpu", "TPU v5 lite"))


def exported(function, *arguments):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.numpy_dtype_promotion("standard"):
        program = jax.export.export(function, platforms=["tpu"])(*shapes)
    assert program.platforms == ("tpu",)
    return program


# zflora-uniform has the blocks of ffba and zflora-minimal.
@pytest.mark.parametrize("method", always(METHODS, lambda m: m not in ("ffba", "zflora-minimal")))
def test_the_train_step_lowers(method):
    model, adapter = tiny_model(dtype="bfloat16", remat="block"), AdapterConfig(method, rank=8)
    model.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OptimConfig(), 10)
    dtypes = {"tokens": jnp.int32, "loss_mask": bool, "segments": jnp.int32}
    batch = {name: jnp.ones((4, 2048), dtype) for name, dtype in dtypes.items()}
    config = model.config.replace(max_position_embeddings=2048)
    step = make_train_step(
        config, adapter, OptimConfig(), 10, objective=CrossEntropy(64), grad_accum_steps=2
    )
    text = exported(step, model.params, state, batch).mlir_module()
    assert "bf16" in text and "splash_mqa_dkv" in text


@pytest.mark.parametrize("method", ["zflora-minimal", "zflora-uniform"])
def test_decoding_lowers(method):
    model, adapter = tiny_model(dtype="bfloat16"), AdapterConfig(method, rank=8)
    model.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    ready = packed(fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter))))
    generation = DecodeProgram(ready.config, None, Sampler(0.7, top_k=5, top_p=0.9), (257,))

    @jax.jit
    def run(params, tokens, valid, keys):
        return generation.decode({"params": params}, tokens, valid, keys, 8)

    tokens, keys = jnp.ones((2, 128), jnp.int32), jax.random.split(jax.random.key(0), 2)
    program = exported(run, ready.params, tokens, tokens > 0, keys)
    assert program.out_avals[0].shape == (2, 8)
    assert program.mlir_module().count("splash_mqa_fwd") > 0
