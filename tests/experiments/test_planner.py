"""Plans: counts and bytes against the shapes of what is made and against the compiler; what does
not fit comes with changes that make it fit.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from support.cases import dead_slices
from support.grids import always

from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments import compiled_plan, planner
from zflora_jax.hf.load import model_config
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import random_model
from zflora_jax.parallel.targets import GIB
from zflora_jax.training.trainer import init_state

SMALL = preset("tiny").replace(num_kv_heads=4, vocab_size=264, num_layers=3)


def small_run(method: str = "zflora-minimal", **changes: object) -> RunConfig:
    run = RunConfig(
        adapter=AdapterConfig(method, rank=8),
        data=DataConfig(batch_size=8, bucket_lengths=(64, 128)),
        train=TrainConfig(loss_chunk=64),
    )
    return override(run, changes)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_stored_is_counted_exactly(method):
    run = small_run(method)
    plan = planner.memory_plan(run, SMALL)

    def made():
        model = random_model(SMALL, jax.random.key(0))
        adapters = init_adapters(jax.random.key(0), model, run.adapter)
        return model.params, adapters, init_state(adapters, run.optim, run.train.steps)

    params, adapters, state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(made)
    )
    sizes = plan["bytes_per_device"]
    dead = sum(leaf.size for leaf in dead_slices(SMALL, run.adapter, adapters))
    assert plan["params_base"] == trees.size(params)
    # Dead layers take memory all the same.
    assert plan["params_trainable"] == trees.size(adapters) - dead
    assert sizes["base"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert sizes["adapters"] == sum(x.nbytes for x in jax.tree.leaves(adapters))
    moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert sizes["optimizer"] == moments and sizes["total"] == sum(
        size for name, size in sizes.items() if name != "total"
    )
    assert (plan["tokens_per_step"], plan["tokens"]) == (8 * 128, 8 * 128 * 100)


@pytest.mark.parametrize(
    ("method", "changes"),
    always(
        [
            ("lora", {}),
            ("zflora-minimal", {}),
            ("zflora-uniform", {"train.remat": "block"}),
            ("zflora-minimal", {"data.grad_accum_steps": 2}),
            ("full", {}),
            ("zflora-minimal", {"mesh.fsdp": 4}),
            ("lora", {"mesh.data": 2, "mesh.tensor": 4}),
        ],
        lambda case: case not in (("lora", {}), ("zflora-minimal", {})),
    ),
)
def test_the_estimate_is_near_the_compiler_s(method, changes):
    """Within a factor of 1.5 either way: what the compiler shares or copies is its own business,
    what is forgotten would show.
    """
    run = small_run(method, **changes)
    estimate, compiled = (
        planner.memory_plan(run, SMALL)["bytes_per_device"],
        compiled_plan.compiled(run, SMALL),
    )
    # Which a full step does not read.
    stored = (
        estimate["adapters"] + estimate["optimizer"] + (0 if method == "full" else estimate["base"])
    )
    assert compiled["arguments"] == pytest.approx(stored, rel=0.05)
    assert (
        estimate["total"] / 1.5
        < compiled["total"] + estimate["base"] * (method == "full")
        < estimate["total"] * 1.5
    ), (estimate, compiled)


def test_full_under_fsdp_counts_the_gradient_of_its_head():
    """Summed over the chunks before it is divided again; of a wide vocabulary it is most of the
    step.
    """
    run, wide = small_run("full", **{"mesh.fsdp": 4}), SMALL.replace(vocab_size=16384)
    estimate = planner.memory_plan(run, wide)["bytes_per_device"]
    # Which a full step does not read.
    compiled = compiled_plan.compiled(run, wide)["total"] + estimate["base"]
    assert estimate["total"] / 1.5 < compiled < estimate["total"] * 1.5, (estimate, compiled)


def test_what_the_backward_pass_keeps_is_counted_by_its_policy():
    kept = {
        remat: planner.memory_plan(small_run(**{"train.remat": remat}), SMALL)["bytes_per_device"]
        for remat in ("none", "dots", "block", "offload")
    }
    kept = {remat: sizes["activations"] for remat, sizes in kept.items()}
    assert kept["none"] > kept["dots"] > 2 * kept["block"]
    assert kept["offload"] == kept["block"], "what is offloaded lies in the host's memory"


def test_a_flash_kernel_keeps_no_scores():
    """Twice the tokens, twice the working set; with scores it would be more."""
    config = SMALL.replace(max_position_embeddings=8192, vocab_size=64)
    sizes = {
        (length, flash): planner.bytes_per_device(
            small_run(**{"data.bucket_lengths": [length], "train.loss_chunk": 16}),
            config,
            flash=flash,
        )["working set"]
        for length in (2048, 4096)
        for flash in (False, True)
    }
    assert sizes[4096, True] == pytest.approx(2 * sizes[2048, True], rel=0.02)
    assert sizes[2048, True] < sizes[2048, False] and sizes[4096, False] > sizes[4096, True]


def test_meshes_divide_what_they_divide():
    whole = planner.bytes_per_device(small_run(), SMALL)
    fsdp = planner.bytes_per_device(small_run(**{"mesh.fsdp": 4}), SMALL)
    assert fsdp["base"] < whole["base"] / 3.5 and fsdp["activations"] < whole["activations"] / 3
    tensor = planner.bytes_per_device(small_run(**{"mesh.tensor": 4}), SMALL)
    assert (
        tensor["base"] < whole["base"] / 3.5
        and whole["activations"] / 4 < tensor["activations"] < whole["activations"]
    )
    data = planner.bytes_per_device(small_run(**{"mesh.data": 4}), SMALL)
    assert data["base"] == whole["base"] and data["activations"] == fsdp["activations"]


def test_a_gathered_head_is_counted():
    """Under fsdp the table of tokens is gathered for each chunk of logits; of llama-3.2-1b it is
    larger than all else at one time.
    """
    run = dataclasses.replace(
        small_run(**{"data.bucket_lengths": [64]}),
        train=TrainConfig(dtype="bfloat16", loss_chunk=64),
    )
    config = model_config("llama-3.2-1b")
    whole = planner.bytes_per_device(run, config)["working set"]
    assert (
        planner.bytes_per_device(override(run, {"mesh.fsdp": 8}), config)["working set"]
        > 128256 * 2048 * 2
        > whole / 2
    )


def test_what_does_not_fit_comes_with_the_cheapest_changes():
    run = small_run()
    total = planner.memory_plan(run, SMALL)["bytes_per_device"]["total"]
    assert planner.memory_plan(run, SMALL, total / GIB)["fits"]
    plan = planner.memory_plan(run, SMALL, 0.5 * total / GIB)
    assert not plan["fits"] and 2 <= len(plan["changes"]) <= 4
    for change in plan["changes"][:-1]:
        changed = override(run, change["settings"])
        assert (
            planner.memory_plan(changed, SMALL)["bytes_per_device"]["total"]
            == change["total"]
            < total
        )
    assert (
        plan["changes"][-1]["change"] == "all of these that go together"
        and plan["changes"][-1]["fits"]
    )
    assert "data.grad_accum_steps" in plan["changes"][0]["settings"]
    text = "\n".join(planner.plan_lines(plan))
    assert "does not fit" in text and "data.grad_accum_steps=2" in text


def test_changes_that_do_not_go_together_are_not_put_together():
    run = small_run(**{"mesh.fsdp": 4, "train.remat": "block"})
    plan = planner.memory_plan(run, SMALL, 0.0001)
    assert not plan["fits"] and plan["changes"][-1]["change"] == "all of these that go together"


def test_real_sizes_need_no_weights():
    for name, bytes_base in (
        ("llama-3.2-1b", 2 * 1_235_814_400),
        ("llama-2-7b", 2 * 6_738_415_616),
    ):
        run = dataclasses.replace(small_run(), train=TrainConfig(dtype="bfloat16"), model=name)
        assert (
            planner.memory_plan(run, model_config(name))["bytes_per_device"]["base"] == bytes_base
        )


def test_wrong_plans(tmp_path):
    with pytest.raises(ConfigError, match=r"mesh.tensor=3 does not divide"):
        planner.memory_plan(small_run(**{"mesh.tensor": 3}), SMALL)
    with pytest.raises(ConfigError, match="beyond the model's context of 512"):
        planner.memory_plan(small_run(**{"data.bucket_lengths": [64, 1024]}), SMALL)
    for memory in (0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"memory={memory}: must be positive and finite"):
            planner.memory_plan(small_run(), SMALL, memory)
    with pytest.raises(ConfigError, match="needs 16 devices; there are 8"):
        compiled_plan.compiled(
            dataclasses.replace(small_run(), mesh=MeshConfig(1, 8, 2)),
            SMALL.replace(num_heads=8, num_kv_heads=8),
        )


def test_the_command_reads_a_directory_s_config(tmp_path, capsys):
    model = random_model(SMALL, jax.random.key(0))
    save_hf(tmp_path / "model", model)
    (tmp_path / "model" / "model.safetensors").unlink()  # no weights are read
    source = str(tmp_path / "model")
    text = (
        "from zflora_jax.config import *\ndef get_config():\n    return"
        f" RunConfig(model={source!r}, data=DataConfig(batch_size=2))\n"
    )
    (tmp_path / "c.py").write_text(text)
    assert (
        main(
            [
                "plan",
                "--config",
                str(tmp_path / "c.py"),
                "--memory",
                "0.001",
                "--out",
                str(tmp_path / "plan.json"),
            ]
        )
        == 0
    )
    written, shown = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert written["fits"] is False and written["bytes_per_device"]["base"] == sum(
        x.nbytes for x in jax.tree.leaves(model.params)
    )
    assert "does not fit in 0.00 GiB" in shown and "params_trainable" in shown
    with pytest.raises(CheckpointError, match="no model at"):
        model_config(str(tmp_path / "none"))
