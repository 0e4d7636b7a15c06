"""A model on a mesh computes, fuses and generates what one device does, and no device holds the
whole.
"""

import dataclasses
import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support.checks import assert_logits_close, assert_trees_equal, compiled
from support.grids import always
from support.meshes import MESH, PROMPTS, assert_divided, both
from support.models import perturb, tiny_model

from zflora_jax import ConfigError, forward, generate_tokens, option_log_likelihoods
from zflora_jax.adapters import fuse as fuse_module
from zflora_jax.adapters.fuse import _fuse, _swap, _unfuse, fuse, swap, unfuse
from zflora_jax.adapters.packing import split_layers
from zflora_jax.cli.options import mesh_asked
from zflora_jax.config import METHODS, MeshConfig, preset
from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.inference.generation_config import GREEDY, Sampler
from zflora_jax.inference.program import DecodeProgram, packed
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.parallel.sharding import make_mesh, shardings
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import eval_step


def assert_no_whole_kernel(text, config):
    """No array that a compiled program stores (so not those inside a fusion) is as large as the
    smallest whole kernel, but for a device's part of a table.
    """
    inside = ("%fused_", "%wrapped_")
    parts = [part for part in text.split("\n\n") if not part.lstrip().startswith(inside)]
    kernels = [
        math.prod(shape)
        for name, shape in param_shapes(config).items()
        if "layers" in name and "kernel" in name
    ]
    table = [config.vocab_size // 2, config.hidden_size // 2]
    for dims in re.findall(r"\w+\[([\d,]+)\]", "\n\n".join(parts)):
        shape = [int(n) for n in dims.split(",")]
        assert math.prod(shape) < min(kernels) or shape == table, dims


@pytest.mark.parametrize("method", always(METHODS, "zflora-uniform".__eq__))
def test_a_model_on_a_mesh_computes_what_one_device_does(method):
    adapter, (model, adapters), (divided, beside) = both(method)
    tokens = np.asarray([PROMPTS[0]])
    wanted = forward(model, tokens, adapter, adapters)
    assert_logits_close(forward(divided, tokens, adapter, beside), wanted)
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, beside)
    assert_divided(fused.params)
    if METHODS[method].in_place == "lora":  # sums in another order
        for name, leaf in trees.flatten(whole.params).items():
            got, atol = trees.flatten(fused.params)[name], 1e-5 * float(np.abs(leaf).max())
            np.testing.assert_allclose(got, leaf, atol=atol, err_msg=name)
    else:
        assert_trees_equal(fused.params, whole.params)
    found, wanted = (generate_tokens(m, PROMPTS, max_new_tokens=8) for m in (fused, whole))
    assert found == wanted
    assert_divided(packed(fused).params)
    assert packed(fused) is packed(fused)
    if METHODS[method].widens:
        base, _ = unfuse(fused)
        assert_divided(base.params)
        assert_trees_equal(base.params, model.params)
        other = perturb(adapters, seed=3)
        wanted = fuse(model, adapter, other).params
        swapped = swap(fused, other)
        assert_divided(swapped.params)
        assert_trees_equal(swapped.params, wanted)


@pytest.mark.parametrize(
    "mesh_config",
    always(
        [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4)], lambda mesh: mesh.tensor == 2
    ),
    ids=str,
)
def test_every_way_to_run_a_model_follows_its_mesh(mesh_config):
    """Likelihoods, sampling, adapters beside the base, a packed model."""
    adapter, (model, adapters), (divided, beside) = both(
        "zflora-minimal", mesh_config, num_layers=1
    )
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, beside)
    options = [[[4, 9], [7], [4, 8, 200]], [[11, 12], [13, 14]], [[1], [2]]]
    scores = (option_log_likelihoods(m, PROMPTS, options) for m in (fused, whole))
    for have, want in zip(*scores, strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5)
    settings = {"max_new_tokens": 6, "stop_token_ids": [263]}
    wanted = generate_tokens(model, PROMPTS, adapter=adapter, adapters=adapters, **settings)
    assert generate_tokens(divided, PROMPTS, adapter=adapter, adapters=beside, **settings) == wanted
    drawn = settings | {"sampler": Sampler(0.8, top_p=0.9), "batch_size": 2}
    wanted = generate_tokens(whole, PROMPTS, **drawn)
    apart = dataclasses.replace(fused, params=packed(fused).params, config=packed(fused).config)
    for one in (fused, apart):
        assert generate_tokens(one, PROMPTS, **drawn) == wanted


def test_a_mesh_of_other_axes_changes_nothing():
    """One of the caller's own, in which a model of one device is used."""
    model, prompt = tiny_model(num_layers=1), [[1, 2, 3]]
    wanted = forward(model, prompt), generate_tokens(model, prompt, max_new_tokens=3)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))):
        found = forward(model, prompt), generate_tokens(model, prompt, max_new_tokens=3)
    assert_logits_close(found[0], wanted[0])
    assert found[1] == wanted[1]


def test_adapters_that_lie_on_one_device_go_with_a_model_on_a_mesh():
    """Those of a run on one device, with a base that was loaded on a mesh."""
    adapter, (model, adapters), (divided, _) = both("zflora-minimal", num_layers=1)
    here = jax.device_put(adapters, jax.devices()[0])
    fused = fuse(divided, adapter, here)
    assert_trees_equal(fused.params, fuse(model, adapter, adapters).params)
    assert_divided(swap(fused, here).params)
    tokens = np.asarray([PROMPTS[0]], np.int32)
    want = forward(model, tokens, adapter, adapters)
    assert_logits_close(forward(divided, tokens, adapter, here), want)
    settings = {"max_new_tokens": 5, "adapter": adapter}
    want = generate_tokens(model, PROMPTS, adapters=adapters, **settings)
    assert generate_tokens(divided, PROMPTS, adapters=here, **settings) == want


@pytest.mark.soak  # of memory
def test_no_program_holds_a_whole_kernel():
    """Neither fusing nor taking apart nor swapping nor decoding: each device's own part of a kernel
    is the largest of it that any of them makes.
    """
    adapter, _, (model, adapters) = both("zflora-uniform", num_layers=1, hidden_size=80)
    fused = fuse(model, adapter, adapters)
    run = packed(fused)
    tokens, valid = np.ones((1, 16), np.int32), np.ones((1, 16), bool)
    given = {"params": run.params}, tokens, valid
    keys = jax.random.split(jax.random.key(0), 1)
    with jax.set_mesh(make_mesh(MESH)):
        programs = {
            "fuse": _fuse.lower(model.config, adapter, model.params, adapters),
            "unfuse": _unfuse.lower(model.config, adapter, fused.params),
            "swap": _swap.lower(fused.config, model.config, adapter, fused.params, adapters),
            "decode": DecodeProgram.decode.lower(
                DecodeProgram(run.config, None, GREEDY, (1,)), *given, keys, 8
            ),
        }
    for name, program in programs.items():
        text = compiled(program).as_text()
        # unfuse gathers blocks, decode the likeliest token of each part of the vocabulary.
        assert "all-gather" not in text or name in ("unfuse", "decode"), name
        assert_no_whole_kernel(text, fused.config)


def test_the_loss_of_layers_apart_gathers_no_kernel():
    """They are in no scan, so XLA would gather those of all layers ahead of the first: a copy of
    the model on every device.
    """
    config = preset("tiny").replace(
        hidden_size=256, intermediate_size=1024, num_layers=4, num_kv_heads=4, scan_layers=False
    )
    mesh = make_mesh(MeshConfig(fsdp=2))
    params = trees.unflatten(
        {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in param_shapes(config).items()}
    )
    size, where = 4 * trees.size(params), shardings(params, mesh)
    params = jax.tree.map(lambda x, at: x.update(sharding=at), params, where)
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    rows = {"tokens": tokens, "segments": tokens, "loss_mask": tokens.update(dtype=bool)}
    with jax.set_mesh(mesh):
        program = compiled(
            eval_step.lower(config, None, {"params": params}, rows, CrossEntropy(128))
        )
    assert program.memory_analysis().temp_size_in_bytes < size / 4


def test_several_processes_divide_a_model_over_all_their_devices(monkeypatch):
    """A model that each of them held whole would be loaded, and evaluated, by each alone."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"mesh.fsdp=2 .* needs 2 devices; there are 8 in 2"):
        mesh_if_there(MeshConfig(fsdp=2))
    with pytest.raises(ConfigError, match=r"2 processes divide .* --set mesh.fsdp=8"):
        mesh_asked({}, None)


@pytest.mark.parametrize("method", always(["zflora-uniform", "lora", "full"], "lora".__ne__))
def test_a_base_is_freed_leaf_by_leaf_as_it_is_fused(method, monkeypatch):
    """The same numbers as with a base that stays, on one device and on a mesh."""
    adapter, one, many = both(method)
    for model, adapters in (one, many):
        want = fuse(model, adapter, adapters)
        leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(model.params)]
        gone = []
        monkeypatch.setattr(fuse_module, "_fuse", watched(leaves, gone))
        found = fuse(model, adapter, adapters, donate=True)
        monkeypatch.undo()
        assert gone == list(range(len(leaves))) and not jax.tree.leaves(model.params)
        assert_trees_equal(found.params, want.params)
        for name, leaf in trees.flatten(found.params).items():
            where = trees.flatten(want.params)[name].sharding
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim), name


def watched(leaves, gone):
    """`_fuse`, noting at each call how many of the base's leaves are no longer in memory."""

    def fuse_leaf(*given):
        gone.append(sum(leaf() is None for leaf in leaves))
        return _fuse(*given)

    return fuse_leaf


@pytest.mark.soak  # of memory
def test_layers_are_split_leaf_by_leaf():
    adapter, _, (model, adapters) = both("zflora-minimal")
    fused = fuse(model, adapter, adapters)
    want, answers = packed(fused), generate_tokens(fused, PROMPTS, max_new_tokens=4)
    found = split_layers(fused)
    assert not found.config.execution.scan_layers and packed(found) is found
    assert_trees_equal(found.params, want.params)
    assert_divided(found.params)
    assert not jax.tree.leaves(fused.params) and split_layers(found) is found
    assert generate_tokens(found, PROMPTS, max_new_tokens=4) == answers
