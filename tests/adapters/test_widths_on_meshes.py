"""A mesh goes with some widths that it does not divide and refuses the others; devices that stay
idle are named.
"""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.checks import assert_trees_equal
from support.meshes import MESH, PROMPTS, adapter_of, assert_divided, model_for_meshes
from support.models import perturb, tiny_model
from support.sharded import three_steps

from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods
from zflora_jax.parallel import sharding
from zflora_jax.parallel.sharding import make_mesh, shard


def test_a_vocabulary_that_tensor_does_not_divide_is_whole_along_it(caplog):
    """Tokens 33 and 259 are real sizes' odd ends: 32001 with one token added. Everything else that
    an axis does not divide stays refused.
    """
    sharding._warn.cache_clear()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        assert sharding.spec("embed/embedding", (259, 64), mesh) == P(None, "fsdp")
        assert sharding.spec("lm_head/kernel", (64, 259), mesh) == P("fsdp", None)
        sharding.spec("lm_head/kernel", (64, 259), mesh)
    said = "mesh.tensor=2 does not divide the vocabulary of 259: every device along tensor"
    assert caplog.text.count(f"{said} holds all rows of lm_head/kernel") == 1
    with pytest.raises(ConfigError, match=r"mesh.fsdp=2 does not divide embed/embedding"):
        sharding.spec("embed/embedding", (259, 63), mesh)
    with pytest.raises(ConfigError, match=r"mesh.tensor=2 does not divide layers_0/mlp/up/kernel"):
        sharding.spec("layers_0/mlp/up/kernel", (64, 33), mesh)


def test_an_undivided_vocabulary_trains_scores_and_decodes_as_on_one_device():
    model = tiny_model(num_heads=4, num_kv_heads=4, vocab_size=259, num_layers=1)
    adapter, found = adapter_of("zflora-minimal"), []
    for config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        metrics, adapters = three_steps(model, adapter, config, std=0.05)
        mesh = make_mesh(config)
        divided = dataclasses.replace(model, params=shard(model.params, mesh))
        fused = fuse(divided, adapter, shard(adapters, mesh))
        scores = option_log_likelihoods(fused, PROMPTS[:1], [[[4, 9], [7]]])[0]
        found.append(([*metrics.flat, *scores], generate_tokens(fused, PROMPTS, max_new_tokens=6)))
    (wanted, answers), (floats, tokens) = found
    np.testing.assert_allclose(floats, wanted, rtol=2e-5)
    assert tokens == answers


def test_an_axis_that_does_not_divide_a_fused_width_goes_to_another(caplog):
    sharding._warn.cache_clear()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))

    def fused(name, *shape):
        return sharding.spec(name, shape, mesh, fused=True)

    # Whole heads.
    assert fused("layers/attn/q/kernel", 3, 67, 4, 32) == P(None, None, ("tensor", "fsdp"), None)
    assert fused("layers/attn/q/kernel", 3, 67, 2, 32) == P(None, None, "tensor", "fsdp")
    assert fused("layers/attn/o/kernel", 3, 4, 32, 67) == P(None, ("tensor", "fsdp"), None, None)
    assert fused("layers/mlp/gate/kernel", 3, 67, 132) == P(None, None, ("tensor", "fsdp"))
    assert fused("layers/mlp/gate/kernel", 3, 64, 131) == P(None, ("fsdp", "tensor"), None)
    assert fused("embed/embedding", 264, 67) == P(("tensor", "fsdp"), None)
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        assert fused("layers/mlp/up/kernel", 3, 67, 130) == P(None, None, "tensor")
    assert "mesh.fsdp=2 divides no dimension of mlp/up/kernel, shape (67, 130)" in caplog.text
    assert (
        "widens the stream of 67 by 1 more (rank, extra_head_dim or extra_mlp_units)" in caplog.text
    )
    with pytest.raises(ConfigError, match="does not divide"):
        sharding.spec("layers/attn/q/kernel", (3, 67, 4, 32), mesh)


def test_a_fused_model_of_an_odd_rank_is_divided_all_the_same():
    adapter = AdapterConfig("zflora-minimal", rank=3, extra_mlp_units=4)
    model = model_for_meshes(num_layers=1)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05)
    divided = dataclasses.replace(model, params=shard(model.params, make_mesh(MESH)))
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, adapters)
    assert fused.config.hidden_size == 67
    assert_divided(fused.params)
    assert_trees_equal(fused.params, whole.params)
    answers = (generate_tokens(m, PROMPTS, max_new_tokens=6) for m in (fused, whole))
    assert next(answers) == next(answers)
    assert_trees_equal(unfuse(fused)[0].params, model.params)


def test_devices_that_stay_idle_are_named(caplog):
    sharding._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        make_mesh(MeshConfig(), jax.devices()[:1])  # as a sweep gives each run its part
        make_mesh(MeshConfig(data=8))
        assert not caplog.text
        for config in (MeshConfig(), MeshConfig(), MeshConfig(data=3)):
            make_mesh(config)
    first = "the mesh uses 1 of 8 devices, 7 stay idle: raise mesh.data or mesh.fsdp"
    assert caplog.text.count(first) == 1
    assert "3 of 8 devices, 5 stay idle: " in caplog.text
