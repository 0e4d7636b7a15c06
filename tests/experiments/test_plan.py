"""`zflora plan`: counts and bytes against what is made and compiled; steps compiled for absent
devices.
"""

from __future__ import annotations

import collections
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from program_text import Program, kernels
from support.grids import always
from support.hosts import config_file
from support.needs import needs_libtpu

from zflora_jax import ConfigError, make_mesh, override, preset, random_model, save_hf
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import adapter_shapes
from zflora_jax.cli.main import main
from zflora_jax.config import METHODS, AdapterConfig, DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.experiments import plan as module
from zflora_jax.experiments.plan import (
    compile_step,
    lowered_step,
    memory_plan,
    plan_table,
    step_attention,
)
from zflora_jax.experiments.roofline import roofline
from zflora_jax.experiments.step_shapes import stored_bytes
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.targets import CHIPS, GIB, Target, target
from zflora_jax.training.trainer import init_state

TINY, V5E = preset("tiny"), CHIPS["tpu:v5e"]
SMALL = TINY.replace(num_kv_heads=4, vocab_size=264, num_layers=3)
RUN = RunConfig(
    model="tiny",
    adapter=AdapterConfig("zflora-minimal", rank=8, extra_mlp_units=8),
    data=DataConfig(batch_size=8, bucket_lengths=(128,)),
    train=TrainConfig(steps=100, dtype="bfloat16", loss_chunk=128),
    mesh=MeshConfig(fsdp=4),
)


def small_run(method: str = "zflora-minimal", **changes: object) -> RunConfig:
    run = RunConfig(
        adapter=AdapterConfig(method, rank=8),
        data=DataConfig(batch_size=8, bucket_lengths=(64, 128)),
        train=TrainConfig(loss_chunk=64),
    )
    return override(run, changes)


def program_for(run: RunConfig, config: Any = TINY, name: str = "tpu:v5e:2x2") -> Program:
    _, step = compile_step(run, config, target(name))
    return Program(step.as_text())


@pytest.mark.parametrize("method", METHODS)
def test_stored_bytes_are_exact(method: str) -> None:
    run = small_run(method)

    def made() -> Any:
        model = random_model(SMALL, jax.random.key(0))
        adapters = init_adapters(jax.random.key(0), model, run.adapter)
        return model.params, adapters, init_state(adapters, run.optim, run.train.steps)

    params, adapters, state = jax.eval_shape(made)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    sizes, trained = stored_bytes(run, SMALL), bytes_in(adapters)
    wanted = {"base": bytes_in(params), "adapters": trained, "optimizer": bytes_in(moments)}
    assert sizes == wanted | {"gradients": trained}
    accumulated = stored_bytes(override(run, {"data.grad_accum_steps": 2}), SMALL)
    assert accumulated == sizes | {"gradients": 2 * trained}
    parts = [override(run, {f"mesh.{axis}": 4}) for axis in ("data", "fsdp", "tensor")]
    data, fsdp, tensor = (stored_bytes(part, SMALL)["base"] for part in parts)
    assert data == sizes["base"] > 3.5 * max(fsdp, tensor)


def bytes_in(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("method", "changes"),
    always(
        [
            ("lora", {}),
            ("zflora-minimal", {"data.grad_accum_steps": 2}),
            ("full", {}),
            ("zflora-minimal", {"mesh.fsdp": 4}),
            ("lora", {"mesh.data": 2, "mesh.tensor": 4}),
        ],
        lambda case: case[0] == "lora" and case[1],
    ),
)
def test_the_compiled_step_takes_what_is_stored(method: str, changes: dict[str, Any]) -> None:
    """And the compiler's temporaries are more than the gradients."""
    plan = memory_plan(small_run(method, **changes), SMALL)
    stored, sizes = plan["stored"], plan["compiled"]["bytes"]
    assert (plan["tokens_per_step"], plan["tokens"]) == (8 * 128, 8 * 128 * 100)
    assert "fits" not in plan and plan["compiled"]["target"] == "cpu"
    # A step of all parameters does not read the base.
    taken = stored["adapters"] + stored["optimizer"] + (0 if method == "full" else stored["base"])
    assert sizes["arguments"] == pytest.approx(taken, rel=0.05)
    assert sizes["temporaries"] > stored["adapters"]
    assert sizes["total"] == sizes["arguments"] + sizes["outputs"] + sizes["temporaries"]


def test_a_run_that_does_not_fit_comes_with_changes_that_reduce_it() -> None:
    run = small_run()
    total = memory_plan(run, SMALL)["compiled"]["bytes"]["total"]
    assert memory_plan(run, SMALL, memory_gib=total / GIB)["fits"]
    plan = memory_plan(run, SMALL, memory_gib=0.5 * total / GIB)
    assert not plan["fits"] and "data.grad_accum_steps" in next(iter(plan["changes"].values()))
    for wrong in (math.nan, 1e9):  # no step is that large: its indices would exceed int32
        with pytest.raises(ConfigError, match=f"{wrong}: must be positive and at most 8192"):
            memory_plan(run, SMALL, memory_gib=wrong)
    table = plan_table(plan)
    assert table["the run"].startswith("does not fit in 9.")
    assert "or --set data.grad_accum_steps=2" in table
    for settings in ({"data.grad_accum_steps": 2}, {"train.remat": "block"}):
        assert settings in plan["changes"].values()
        found, _ = compile_step(override(run, settings), SMALL)
        assert found["bytes"]["total"] < total, settings
    full = memory_plan(small_run("full"), SMALL, memory_gib=1e-4)["changes"].values()
    assert {"adapter.method": "zflora-minimal"} in full and {"quantize.kernels": "nf4"} not in full


def test_the_roofline_by_hand() -> None:
    """An adapter on a base of one layer."""
    config = TINY
    lora = AdapterConfig("lora", rank=2)
    run = replace(RUN, adapter=lora, train=TrainConfig(dtype="bfloat16"))
    layers = config.num_layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    head, lora = 259 * 64, config.num_layers * 2 * (128 + 96 + 96 + 128 + 3 * 160)
    found = roofline(run, TINY, V5E, 4_000_000)
    keys = sum(range(1, 129)) / 128  # of a token, in the mean
    attention = config.num_layers * 4 * keys * 64 * 3.5
    flops = 8 * 128 * (4 * (layers + head) + 6 * lora + attention) / 4
    assert found["flops"] == pytest.approx(flops)
    assert found["compute_s"] == pytest.approx(flops / 197e12)
    assert found["link_s"] == pytest.approx(4e6 / 200e9)
    assert found["step_s"] == max(found["compute_s"], found["hbm_s"], found["link_s"])
    full = replace(run, adapter=AdapterConfig("full"))
    flops = 8 * 128 * (6 * (layers + head) + attention) / 4
    assert roofline(full, TINY, V5E, 0)["flops"] == pytest.approx(flops)
    block = replace(run, train=TrainConfig(dtype="bfloat16", remat="block"))
    more = 2 * (layers + head) + 2 * lora + config.num_layers * 4 * keys * 64
    again = roofline(block, TINY, V5E, 0)["flops"]
    assert again - found["flops"] == pytest.approx(8 * 128 * more / 4)
    pairs = roofline(replace(run, train=replace(run.train, loss="dpo")), TINY, V5E, 0)
    assert 1.3 < pairs["hbm_bytes"] / found["hbm_bytes"] < 1.5  # the base is read a third time
    dpo = pairs["flops"]
    keys = sum(range(1, 65)) / 64  # a row is two sequences; another forward pass of the base
    attention = config.num_layers * 4 * keys * 64 * 4.5
    assert dpo == pytest.approx(8 * 128 * (6 * (layers + head) + 6 * lora + attention) / 4)
    codes = replace(run, quantize=QuantizeConfig("int8"))
    less = roofline(codes, TINY, V5E, 0)["hbm_bytes"]
    assert 0.5 < less / found["hbm_bytes"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.tensor": 3}, r"mesh.tensor=3 does not divide"),
        ({"data.bucket_lengths": [64, 1024]}, "beyond the model's context of 512"),
        ({"mesh.fsdp": 8, "mesh.tensor": 2}, "needs 16 devices; there are 8"),
    ],
)
def test_wrong_plans(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        memory_plan(small_run(**changes), SMALL)


def test_the_command_reads_a_directory_s_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(SMALL, jax.random.key(0))
    save_hf(tmp_path / "model", model)
    (tmp_path / "model" / "model.safetensors").unlink()  # no weights are read
    run = replace(small_run(), model=str(tmp_path / "model"))
    given = ["plan", "--config", config_file(run, tmp_path / "c.py"), "--memory", "0.001"]
    assert main([*given, "--out", str(tmp_path / "plan.json")]) == 0
    written, shown = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert written["fits"] is False and written["stored"]["base"] == bytes_in(model.params)
    assert "does not fit in 1.02 MiB" in " ".join(shown.split()) and "params_trainable" in shown


@needs_libtpu
def test_the_command_compiles_for_a_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            *("plan", "--config", "configs/quickstart.py", "--target", "tpu:v5e:2x2"),
            *("--out", str(tmp_path / "plan.json"), "--set", "model=tiny", "mesh.fsdp=4"),
            *("train.dtype=bfloat16", "data.bucket_lengths=128", "data.batch_size=8"),
        ]
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert [x in shown for x in ("v5e:2x2, not run", "decode on a tpu", "on a gpu")] == [1, 1, 0]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["memory_bytes"] == 15.75 * GIB
    assert plan["compiled"]["attention"] == {"kernel": "splash", "reason": ""}
    assert plan["roofline"]["bound"] == "hbm" and "ms a step at least" in shown


@pytest.mark.parametrize("kind", ["RESOURCE_EXHAUSTED", "INTERNAL"])
def test_a_refused_program(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's refusal is told; other errors are bugs."""

    class Lowered:
        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(f"{kind}: Used 20.50G of 15.75G hbm.\nmore")

    monkeypatch.setattr(Target, "devices", lambda self: [SimpleNamespace()] * 8)
    monkeypatch.setattr(module, "make_mesh", lambda *_: None)
    monkeypatch.setattr(module, "step_attention", lambda *_: ("splash", ""))
    monkeypatch.setattr(module, "lowered_step", lambda *_: Lowered())
    if kind == "INTERNAL":
        with pytest.raises(jax.errors.JaxRuntimeError):
            memory_plan(RUN, TINY, target("tpu:v5e:2x4"))
        return
    plan = memory_plan(RUN, TINY, target("tpu:v5e:2x4"))
    assert not plan["fits"] and plan["memory_bytes"] == 15.75 * GIB and plan["changes"]
    table = plan_table(plan)
    assert table["refused by the compiler"] == f"{kind}: Used 20.50G of 15.75G hbm."
    assert table["devices"].startswith("4 of 8")


@needs_libtpu
@pytest.mark.soak  # three programs
def test_the_reported_attention_is_that_of_the_program() -> None:
    """Widened heads beyond what splash takes: the plan says blocks, and so does the program."""
    config = TINY.replace(head_dim=256, num_heads=2, num_kv_heads=1, num_layers=1)
    for adapter, kernel in (
        (AdapterConfig("ffba", rank=4, extra_head_dim=16), "blocks"),
        (AdapterConfig("lora", rank=4), "splash"),
    ):
        run = replace(RUN, adapter=adapter, mesh=MeshConfig())
        mesh = make_mesh(run.mesh, target("tpu:v5e:1x1").devices())
        reported, reason = step_attention(run, config, mesh)
        assert (reported, reason == "") == (kernel, kernel == "splash")
        step = lowered_step(run, config, mesh)
        assert ("tpu_custom_call" in step.as_text()) == (kernel == "splash")
        if kernel == "splash":  # the widest heads that it takes
            compile_step(run, config, target("tpu:v5e:1x1"))


@needs_libtpu
@pytest.mark.soak  # of time
def test_only_sums_of_gradients_cross_slices_and_kernels_are_gathered_one_at_a_time() -> None:
    """A mesh of two slices that uses two of the four devices of each. A ring of two sends each
    gradient twice, in float32.
    """
    target("tpu:v5e:2x2").devices()  # how libtpu starts
    every = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2).devices
    run = replace(RUN, mesh=MeshConfig(data=2, fsdp=2))
    with no_compile_cache():
        mesh = make_mesh(run.mesh, [*every[:2], *every[4:6]])
        text = lowered_step(run, TINY, mesh).compile().as_text()
    program = Program(text)
    assert set(re.findall(r'transfer_type="(\w+)"', text)) == {"ALL_REDUCE"}
    adapters = sum(map(math.prod, adapter_shapes(TINY, run.adapter).values()))
    assert 0 < program.collectives()["between slices"] <= 8 * adapters
    sizes = [math.prod(a + b) for a, b in kernel_shapes(TINY).values()]
    table = TINY.vocab_size * TINY.hidden_size
    gathered = [op for op, _ in program.runs(fused=True) if op.code.startswith("all-gather")]
    assert gathered and all(op.elements <= max(*sizes, table) for op in gathered)
    assert sum(times for op, times in program.runs() if kernels([op])) > 100


def summed_by(program: Program) -> list[tuple[Any, int]]:
    """(all-reduce, how often it runs) of a program."""
    return [
        (op, times)
        for op, times in program.runs(fused=True)
        if op.code.startswith("all-reduce") and not op.code.endswith("-done")
    ]


@needs_libtpu
@pytest.mark.parametrize("method", ["lora", "zflora-uniform"])
@pytest.mark.soak  # two programs
def test_devices_add_up_gradients_in_float32(method: str) -> None:
    """Also for a bfloat16 base: on many devices a sum in bfloat16 would lose the last bits."""
    adapter = AdapterConfig(method, rank=8)
    run = replace(RUN, mesh=MeshConfig(data=4), adapter=adapter)
    summed: collections.Counter[str] = collections.Counter()
    for op, times in summed_by(program_for(run)):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", op.shape):
            summed[dtype] += times * math.prod(map(int, shape.split(",")))
    assert summed.keys() == {"f32"}
    assert summed["f32"] >= sum(map(math.prod, adapter_shapes(TINY, adapter).values()))
