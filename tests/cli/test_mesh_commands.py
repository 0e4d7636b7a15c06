"""Commands load, evaluate, generate from and export a run that was trained on a mesh, on its mesh
or on another one.
"""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.meshes import MESH, adapter_of, assert_divided, model_for_meshes

from zflora_jax import DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig, make_mesh, train
from zflora_jax.cli.main import main
from zflora_jax.config import MeshConfig
from zflora_jax.core.fields import override
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.experiments.setup import held_out
from zflora_jax.hf.save import save_hf
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run on fsdp=2 x tensor=2."""
    folder = tmp_path_factory.mktemp("mesh")
    save_hf(folder / "model", model_for_meshes())
    run = RunConfig(
        model=str(folder / "model"),
        adapter=adapter_of("zflora-uniform"),
        data=DataConfig(batch_size=4, bucket_lengths=(320,), train_limit=16),
        optim=OptimConfig(warmup_steps=1, learning_rate=3e-2, schedule="constant"),
        train=TrainConfig(steps=3, loss_chunk=128),
        eval=EvalConfig(limit=3, batch_size=2, max_new_tokens=6),
        mesh=MESH,
    )
    train(run, folder / "run", console=False)
    return folder / "run"


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_a_run_is_loaded_and_used_on_its_mesh(trained, tmp_path):
    run, base, adapters, step = load_run(trained)
    _, alone, wanted, _ = load_run(trained, mesh=one_device())
    assert step == 3 and float(np.abs(wanted["layers"]["attn"]["q"]["backward"]).max()) > 1e-3
    assert_divided(base.params)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    assert adapters["layers"]["attn"]["q"]["forward"].sharding.mesh.shape == sizes
    assert_trees_equal(adapters, wanted)
    rows, three = held_out(run, alone), override(run, {"data.batch_size": 3, "mesh.fsdp": 1})
    losses = [
        held_out_loss(three, m, rows, a)["loss"] for m, a in ((base, adapters), (alone, wanted))
    ]
    report = json.loads((trained / "report.json").read_text())
    np.testing.assert_allclose(
        losses, report["test_loss" if run.eval.split == "test" else "validation_loss"], rtol=2e-5
    )
    fused, label = load_fused(trained)
    assert label == "step3"
    assert_divided(fused.params)
    assert_trees_equal(fused.params, load_fused(trained, mesh=one_device())[0].params)


@pytest.mark.soak  # test_hosts_commands runs commands on a mesh
def test_a_command_uses_the_mesh_of_the_run_or_the_one_given(trained, capsys, monkeypatch):
    """The answer is the same on four devices (the run's) and on one."""
    used: list[int] = []

    def noted(tree):
        mesh = mesh_of(tree)
        used.append(1 if mesh is None else mesh.size)
        return mesh_in_use(tree)

    monkeypatch.setattr("zflora_jax.inference.decode.mesh_in_use", noted)
    asks, said = ["--workdir", str(trained), "--prompt", "2+3=", "--max-new-tokens", "5"], []
    for mesh, parts in (([], 4), (["--set", "mesh.fsdp=1", "mesh.tensor=1"], 1)):
        used.clear()
        assert main(["generate", *asks, *mesh]) == 0
        assert set(used) == {parts}
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_an_export_does_not_gather_the_model(trained, tmp_path):
    """One tensor of one layer is on the host at a time: no array keeps a copy there."""
    model, _ = load_fused(trained)
    save_hf(tmp_path / "out", model)
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(model.params))


def test_with_fewer_devices_a_run_is_loaded_onto_one(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    mesh = {"data": 1, "fsdp": 2, "tensor": 32}
    config = json.loads((trained / "config.json").read_text()) | {"mesh": mesh}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        _, model, adapters, _ = load_run(tmp_path / "run")
    assert (
        "a run of 64 devices (mesh.data=1 x mesh.fsdp=2 x mesh.tensor=32) is loaded onto one: there"
        " are only 8" in caplog.text
    )
    assert all(
        len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves((model.params, adapters))
    )


@pytest.mark.parametrize("command", ["generate", "export"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.steps=3",
            "--set train.steps: a trained run's settings cannot be changed here; only mesh.* can",
        ),
        ("mesh.fdsp=2", "unknown key 'fdsp' of MeshConfig: did you mean 'fsdp'?"),
        ("mesh.data=8", "mesh.data=8 x mesh.fsdp=2 x mesh.tensor=2 needs 32 devices; there are 8"),
    ],
)
def test_other_settings_and_too_few_devices_are_refused(
    command, setting, message, trained, tmp_path, capsys
):
    more = ["--prompt", "x"] if command == "generate" else ["--out", str(tmp_path / "out")]
    assert main([command, "--workdir", str(trained), *more, "--set", setting]) == 2
    assert message in capsys.readouterr().err
