"""Sharded training equals training on one device, whatever the mesh; the rules cover every
parameter; widths that a mesh does not divide; slices of devices, between which only sums over the
data axis cross (TPU programs: test_plan.py); wrong meshes say what to change.
"""

import dataclasses
import logging
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.cases import BY_METHOD, DORA, UNIFORM, adapter_cases, case_id
from support.checks import assert_trees_equal, compiled
from support.grids import always
from support.meshes import MESH, PROMPTS, adapter_of, assert_divided, model_for_meshes
from support.models import perturb, tiny_model
from support.sharded import pairs, sharded_model, sharded_step, three_steps

from zflora_jax import ConfigError, fuse, option_log_likelihoods, train, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import adapter_shapes
from zflora_jax.config import PRESETS, AdapterConfig, DataConfig, MeshConfig, RunConfig, preset
from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS, group, param_shapes
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.parallel import sharding
from zflora_jax.parallel.sharding import arrange, make_mesh, shard
from zflora_jax.training.objective import DirectPreference


def rank_6(method):
    return AdapterConfig(method, rank=6, alpha=9.0, extra_mlp_units=6 if "zf" in method else None)


# UNIFORM has every kind of block that widens.
@pytest.mark.parametrize("adapter", always([*BY_METHOD, DORA], UNIFORM.__eq__), ids=case_id)
def test_a_mesh_of_every_axis_gives_the_numbers_of_one_device(adapter):
    model = sharded_model()
    wanted, adapters = three_steps(model, adapter, MeshConfig())
    assert wanted[2, 0] < wanted[0, 0]
    metrics, found = three_steps(model, adapter, MeshConfig(2, 2, 2), grad_accum_steps=2)
    np.testing.assert_allclose(metrics, wanted, rtol=2e-5)
    for leaf, value in trees.flatten(found).items():
        np.testing.assert_allclose(value, trees.flatten(adapters)[leaf], atol=2e-5, err_msg=leaf)


def test_pairs_on_a_mesh_give_the_numbers_of_one_device():
    objective, adapter = DirectPreference(beta=0.2, chunk=10), rank_6("zflora-minimal")
    settings = {"rows": pairs(), "objective": objective}
    wanted, _ = three_steps(sharded_model(), adapter, MeshConfig(), **settings)
    assert wanted[2, 0] < wanted[0, 0] and wanted[0, 2] == 8
    found, _ = three_steps(
        sharded_model(), adapter, MeshConfig(2, 2, 2), grad_accum_steps=2, **settings
    )
    np.testing.assert_allclose(found, wanted, rtol=5e-5)


def shapes_in(pattern, text):
    return {tuple(map(int, dims.split(","))) for dims in re.findall(pattern, text)}


def program(model, adapter, config):
    """The text of the compiled train step, and its arguments."""
    mesh, step, arguments = sharded_step(model, adapter, config)
    with jax.set_mesh(mesh):
        return compiled(step.lower(*arguments)).as_text(), arguments


def test_layers_ask_for_whole_kernels():
    """Else XLA's TPU compiler makes a loop of each product of a large kernel."""
    mesh, step, arguments = sharded_step(sharded_model(), rank_6("lora"), MeshConfig(fsdp=4))
    with jax.set_mesh(mesh):
        text = step.lower(*arguments).as_text()
    assert text.count("sdy.sharding_constraint") > 20


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (rank_6("zflora-minimal"), {}),
        (rank_6("zflora-minimal"), {"scan_layers": False}),
        (dataclasses.replace(DORA, dropout=0.1), {"remat": "none"}),  # reshapes kernels
    ],
)
@pytest.mark.soak  # of time; numbers are above
def test_fsdp_gathers_one_layer_at_a_time(adapter, changes):
    """No collective moves a stack of layers, and no pass keeps one."""
    model = sharded_model(num_layers=3, **changes)
    text, _ = program(model, adapter, MeshConfig(fsdp=4))
    gathered = shapes_in(r"= f32\[([\d,]+)\]\S* all-gather", text)
    every = param_shapes(model.config).items()
    shapes = {shape[name.startswith("layers/") :] for name, shape in every}
    sizes = {int(np.prod(shape)) for shape in shapes}
    assert gathered and max(int(np.prod(dims)) for dims in gathered) <= max(sizes)
    kernels = {shape for shape in shapes if len(shape) > 1 and 264 not in shape}
    assert {int(np.prod(shape)) for shape in kernels} <= {int(np.prod(dims)) for dims in gathered}
    kernels |= {(shape[0], int(np.prod(shape[1:]))) for shape in kernels}
    assert not shapes_in(r"f32\[([\d,]+)\]", text) & {(3, *shape) for shape in kernels}


@pytest.mark.parametrize(
    ("method", "tied"), [("zflora-minimal", True), ("zflora-minimal", False), ("full", True)]
)
@pytest.mark.soak  # of time; numbers are above
def test_the_head_is_gathered_and_its_gradient_summed_once_a_step(method, tied):
    """Not in the loop over chunks, of which there are two."""
    model = sharded_model(tie_word_embeddings=tied)
    text, _ = program(model, rank_6(method), MeshConfig(fsdp=4))
    found = []
    for computation in text.split("\n\n"):
        for shapes, kind in re.findall(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", computation
        ):
            if re.search(r"\[(264,64|64,264|66,64|64,66)\]", shapes):
                found.append((kind, computation.lstrip().startswith("ENTRY")))
    assert all(entry for _, entry in found), found
    kinds = [kind for kind, _ in found]
    assert kinds.count("all-gather") == 1 and len(kinds) == (2 if method == "full" else 1), found


@pytest.mark.parametrize(
    "config", [MeshConfig(2, 2, 2), MeshConfig(2, 4, 1), MeshConfig(1, 4, 2)], ids=str
)
@pytest.mark.soak  # of memory; numbers are above
def test_no_device_holds_the_embeddings_of_the_whole_batch(config):
    model = sharded_model()
    text, (_, _, batch) = program(model, rank_6("zflora-minimal"), config)
    rows, length = batch["tokens"].shape
    shapes, d = shapes_in(r"f32\[([\d,]+)\]", text), model.config.hidden_size
    assert (rows // config.row_parts, length, d) in shapes
    assert (rows, length, d) not in shapes


def test_every_parameter_of_every_model_and_method_has_a_rule():
    for config in PRESETS.values():
        for name in (*param_shapes(config), "lm_head/kernel"):
            assert len(sharding.axes_of(name)) >= 1
    config = preset("tiny").replace(num_kv_heads=4, vocab_size=264)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    for adapter in adapter_cases():
        for name, shape in adapter_shapes(config, adapter).items():
            assert len(sharding.spec(name, shape, mesh)) == len(shape), (case_id(adapter), name)
    for leaf in (f"layers/{group(kernel)}/{kernel}" for kernel in KERNELS):
        for pair in (("lora_a", "lora_b"), ("forward", "backward")):  # inputs' axes, then outputs'
            axes = [axis for part in pair for axis in sharding.axes_of(f"{leaf}/{part}")]
            wanted = sharding.axes_of(f"{leaf}/kernel")
            assert list(filter(None, dict.fromkeys(axes))) == list(filter(None, wanted)), leaf
    said = "no sharding rule covers the parameter 'layers/attn/q/kernal': add one to RULES"
    with pytest.raises(ConfigError, match=said):
        sharding.axes_of("layers/attn/q/kernal")


def test_large_kernels_are_divided_over_all_of_fsdp_and_tensor():
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    for name, shape in param_shapes(preset("llama-3.2-1b")).items():
        if not name.endswith("scale"):
            local = jax.NamedSharding(mesh, sharding.spec(name, shape, mesh)).shard_shape(shape)
            assert np.prod(local) * 8 == np.prod(shape), name


def test_a_mesh_of_too_many_devices_is_refused_before_a_model_is_looked_for():
    run = RunConfig("none", data=DataConfig(batch_size=64), mesh=MeshConfig(data=64))
    with pytest.raises(ConfigError, match=r"needs 64 devices; there are 8"):
        train(run, "w")


# --- widths that a mesh does not divide ----------------------------------------------------------


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
    said = r"mesh.tensor=2 does not divide layers/attn/k/kernel, shape \(30, 576, 3, 64\), at the"
    with pytest.raises(ConfigError, match=f"{said} dimension of 3. Choose .* that does, e.g. 1"):
        sharding.spec("layers/attn/k/kernel", (30, 576, 3, 64), mesh)


@pytest.mark.soak
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


@pytest.mark.soak  # of memory
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


# --- slices of devices ---------------------------------------------------------------------------


def devices(slices):
    kind = {"platform": "cpu", "device_kind": "cpu", "process_index": 0}
    return [SimpleNamespace(id=i, slice_index=at, **kind) for i, at in enumerate(slices)]


def ids(config, found):
    return np.vectorize(lambda device: device.id)(arrange(config, found)).tolist()


def test_the_devices_of_a_slice_are_neighbours(caplog):
    found = ids(MeshConfig(data=4, fsdp=2), devices([0, 1] * 4))
    assert found == [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]] and not caplog.text


def torus(*size):
    """A TPU v5e slice of so many columns and rows; each host has 2 x 2 of it."""
    hosts = [(x, y) for y in range(0, size[1], 2) for x in range(0, size[0], 2)]
    coords = [(x + dx, y + dy, 0) for x, y in hosts for dy in (0, 1) for dx in (0, 1)]
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0, "slice_index": 0}
    return [
        SimpleNamespace(**kind, id=i, process_index=i // 4, coords=found)
        for i, found in enumerate(coords)
    ]


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 1), (1, 16, 1), (2, 2, 4)])
def test_devices_along_an_axis_are_linked(shape):
    coords = np.vectorize(lambda device: device.coords, otypes=[object])
    found = coords(arrange(MeshConfig(*shape), torus(4, 4)))
    assert {*found.flat} == {device.coords for device in torus(4, 4)}
    for axis in (1, 2):  # data talks once a step
        pairs = zip(found.flat, np.roll(found, -1, axis).flat, strict=True)
        steps = [sum(min((b - a) % 4, (a - b) % 4) for a, b in zip(*x, strict=True)) for x in pairs]
        assert {*steps} == {min(shape[axis] - 1, 1)}


def test_devices_that_fill_no_box_or_are_in_other_slices_stay_in_order(caplog):
    six = [device for device in torus(4, 4) if device.id < 6]
    assert ids(MeshConfig(fsdp=6), six) == [[[i] for i in range(6)]]
    assert not caplog.text
    for data, slices in ((1, [0] * 4 + [1] * 4), (2, [0] * 3 + [1] * 5)):
        caplog.clear()
        wanted = np.arange(8).reshape(data, 8 // data, 1).tolist()
        assert ids(MeshConfig(data=data, fsdp=8 // data), devices(slices)) == wanted
        counts = f"in 2 slices of {slices.count(0)}, {slices.count(1)}, and mesh.data={data}"
        assert counts in caplog.text
