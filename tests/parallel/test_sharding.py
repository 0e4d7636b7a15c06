"""Sharded training equals training on one device, whatever the mesh; the rules cover every
parameter; wrong meshes say what to change.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.cases import DORA, adapter_cases, case_id
from support.checks import compiled
from support.grids import always
from support.sharded import sharded_model, sharded_step, three_steps

from zflora_jax.adapters.methods import adapter_shapes
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.core.run_config import (
    DataConfig,
    MeshConfig,
    RunConfig,
)
from zflora_jax.experiments.train import train
from zflora_jax.parallel import sharding
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.metrics import read_metrics


def rank_6(method):
    return AdapterConfig(method, rank=6, alpha=9.0)


@pytest.mark.parametrize(
    "adapter",
    always(
        [*map(rank_6, METHODS), DORA],
        # zflora-uniform has every kind of block that widens.
        lambda adapter: adapter in (rank_6("zflora-uniform"), rank_6("full"), DORA),
    ),
    ids=case_id,
)
def test_a_mesh_of_every_axis_gives_the_numbers_of_one_device(adapter):
    model = sharded_model()
    wanted, adapters = three_steps(model, adapter, MeshConfig())
    assert wanted[2, 0] < wanted[0, 0]
    metrics, found = three_steps(model, adapter, MeshConfig(2, 2, 2), grad_accum_steps=2)
    np.testing.assert_allclose(metrics, wanted, rtol=2e-5)
    for leaf, value in trees.flatten(found).items():
        np.testing.assert_allclose(value, trees.flatten(adapters)[leaf], atol=2e-5, err_msg=leaf)


def shapes_in(pattern, text):
    return {tuple(map(int, dims.split(","))) for dims in re.findall(pattern, text)}


def program(model, adapter, config):
    """The text of the compiled train step, and its arguments."""
    mesh, step, arguments = sharded_step(model, adapter, config)
    with jax.set_mesh(mesh):
        return compiled(step.lower(*arguments)).as_text(), arguments


@pytest.mark.parametrize("scan_layers", always([True, False], bool))
def test_fsdp_gathers_one_layer_at_a_time(scan_layers):
    """No collective moves a stack of layers, and no pass keeps one: every kernel is gathered on its
    own, in each pass anew.
    """
    model = sharded_model(scan_layers=scan_layers, num_layers=3)
    text, _ = program(model, rank_6("zflora-minimal"), MeshConfig(fsdp=4))
    gathered = shapes_in(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert gathered
    shapes = {
        shape[1:] if name.startswith("layers/") else shape
        for name, shape in param_shapes(model.config).items()
    }
    sizes = {int(np.prod(shape)) for shape in shapes}
    assert max(int(np.prod(dims)) for dims in gathered) <= max(sizes)
    kernels = {shape for shape in shapes if len(shape) > 1 and 264 not in shape}
    assert {int(np.prod(shape)) for shape in kernels} <= {int(np.prod(dims)) for dims in gathered}
    assert not shapes_in(r"f32\[([\d,]+)\]", text) & {(3, *shape) for shape in kernels}


@pytest.mark.parametrize(
    ("method", "tied"),
    always(
        [("zflora-minimal", True), ("zflora-minimal", False), ("full", True)],
        lambda case: case != ("zflora-minimal", True),
    ),
)
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
    "config",
    always(
        [MeshConfig(2, 2, 2), MeshConfig(2, 4, 1), MeshConfig(1, 4, 2)],
        lambda mesh: mesh.devices == 8 and mesh.data == mesh.tensor,
    ),
    ids=str,
)
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
    said = "no sharding rule covers the parameter 'layers/attn/q/kernal': add one to RULES"
    with pytest.raises(ConfigError, match=said):
        sharding.axes_of("layers/attn/q/kernal")


def test_large_kernels_are_divided_over_all_of_fsdp_and_tensor():
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    for name, shape in param_shapes(preset("llama-3.2-1b")).items():
        if not name.endswith("scale"):
            local = sharding.placement(mesh, name, shape).shard_shape(shape)
            assert np.prod(local) * 8 == np.prod(shape), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(data=0), r"mesh.data=0: must be at least 1"),
        (lambda: sharding.make_mesh(MeshConfig(3, 3, 3)), r"needs 27 devices; there are 8"),
        (  # before a model is looked for
            lambda: train(
                RunConfig("none", data=DataConfig(batch_size=64), mesh=MeshConfig(data=64)), "w"
            ),
            r"needs 64 devices; there are 8",
        ),
        (
            lambda: sharding.spec(
                "layers/attn/k/kernel", (30, 576, 3, 64), sharding.make_mesh(MeshConfig(tensor=2))
            ),
            (
                r"mesh.tensor=2 does not divide layers/attn/k/kernel, shape \(30, 576, 3, 64\), at"
                r" the dimension of 3. Choose .* that does, e.g. 1"
            ),
        ),
        (
            lambda: RunConfig(data=DataConfig(batch_size=6), mesh=MeshConfig(data=2, fsdp=2)),
            r"does not divide the 6 rows of a micro-batch.*make the batch a multiple of 4",
        ),
    ],
)
def test_wrong_meshes(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_run_goes_on_under_another_mesh(run, tmp_path, monkeypatch):
    """Stopped on one mesh and resumed on another, it has the losses of the run on one device."""
    run = override(run, {"train.steps": 4, "data.grad_accum_steps": 1})
    meshes = {"mesh.data": 2, "mesh.tensor": 2}, {"mesh.fsdp": 4}
    train(run, tmp_path / "one", console=False)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(StopSignals, "requested", lambda self, step: step == 2)
        train(override(run, meshes[0]), tmp_path / "many", console=False)
    trained = train(override(run, meshes[1]), tmp_path / "many", console=False)
    assert trained.report["resumed_from"] == 2
    assert trained.adapters["layers"]["mlp"]["up"]["backward"].sharding.mesh.shape["fsdp"] == 4
    records = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("many", "one"))
    found, wanted = ([r["loss"] for r in each if r["split"] == "train"] for each in records)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 8))
    assert sharding.batch_shards() == 1 and sharding.divide(x, sharding.BATCH) is x
    with jax.set_mesh(sharding.make_mesh(MeshConfig(2, 2, 2))):
        assert sharding.batch_shards() == 4
        divided = jax.jit(lambda x: sharding.divide(x, sharding.BATCH))(x)
        assert divided.sharding.spec == P(("data", "fsdp"))


def test_a_process_puts_its_rows_where_they_belong():
    """Several processes: test_mesh_use.py."""
    rows = {"tokens": np.arange(8 * 3, dtype=np.int32).reshape(8, 3)}
    for config in (MeshConfig(data=2, fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig()):
        mesh = sharding.make_mesh(config)
        assert sharding.own_rows(8, mesh) == list(range(8))
        np.testing.assert_array_equal(sharding.put_rows(rows, 8, mesh)["tokens"], rows["tokens"])
