"""`zflora plan --target`: a run's step compiled for devices that are absent."""

from __future__ import annotations

import collections
import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.grids import always

from zflora_jax.adapters.shapes import adapter_shapes
from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.presets import preset
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.run_config import DataConfig, MeshConfig, RunConfig, TrainConfig
from zflora_jax.experiments import target_plan as module
from zflora_jax.experiments.compiled_plan import compiled_step, lowered_step, step_attention
from zflora_jax.experiments.target_plan import roofline, target_lines, target_plan
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.program_text import Program
from zflora_jax.parallel.sharding import make_mesh
from zflora_jax.parallel.slices import slice_groups
from zflora_jax.parallel.targets import target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra target-tpu"
)
RUN = RunConfig(
    model="tiny",
    adapter=AdapterConfig("zflora-minimal", rank=8),
    data=DataConfig(batch_size=8, bucket_lengths=(128,)),
    train=TrainConfig(steps=100, dtype="bfloat16", loss_chunk=128),
    mesh=MeshConfig(fsdp=4),
)


@needs_libtpu
def test_the_plan_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, with its JSON."""
    main(
        [
            *("plan", "--config", "configs/quickstart.py", "--target", "tpu:v5e:2x2"),
            *("--out", str(tmp_path / "plan.json"), "--set", "model=tiny", "mesh.fsdp=4"),
            *("train.dtype=bfloat16", "data.bucket_lengths=128", "data.batch_size=8"),
        ]
    )
    said = capsys.readouterr().out
    assert "compiled for tpu:v5e:2x2, not run" in said and "an estimate from published" in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    found = plan["compiled"]
    assert plan["fits"] and plan["memory_bytes"] == 15.75 * 2**30
    assert found["bytes"]["total"] == sum(
        found["bytes"][part] for part in ("arguments", "outputs", "temporaries")
    )
    assert found["attention"] == {"kernel": "splash", "reason": ""}
    assert found["kernels"] > 100 and sum(found["collectives"].values()) > 1000


def test_too_few_devices() -> None:
    with pytest.raises(ConfigError, match=r"needs 8 devices; target tpu:v5e:2x2 has 4"):
        target_plan(replace(RUN, mesh=MeshConfig(fsdp=8)), preset("tiny"), target("tpu:v5e:2x2"))


def test_what_does_not_fit_is_told_with_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's refusal gives the bytes; the formula's changes are scaled to them."""
    monkeypatch.setattr(module.Target, "devices", lambda self, slices=1: [object()] * 8)
    facts = {"target": "tpu:v5e:2x4", "needs": 20 * 2**30}
    facts["attention"] = {"kernel": "splash", "reason": ""}
    monkeypatch.setattr(module, "compiled_facts", lambda *_: facts)
    plan = target_plan(RUN, preset("tiny"), target("tpu:v5e:2x4"))
    assert not plan["fits"] and plan["memory_bytes"] == 15.75 * 2**30
    assert 1 <= len(plan["changes"]) <= 4
    assert all(2**30 < change["total"] < 20 * 2**30 for change in plan["changes"])
    lines = target_lines(plan)
    assert any("needs" in line and "20.00 GiB" in line for line in lines)
    assert any("the mesh uses 4 of 8 devices" in line for line in lines)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded", int(20.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: HLO temporaries (46.96G) exceeds available", int(46.96 * 2**30)),
        ("INTERNAL: Used 20.50G of 15.75G hbm", None),
        ("RESOURCE_EXHAUSTED: too many", None),
    ],
)
def test_the_bytes_of_a_refused_program(message: str, needed: int | None) -> None:
    assert module._needed(message) == needed


def test_the_roofline() -> None:
    """By hand: an adapter beside a base of one layer."""
    config = preset("tiny").replace(num_layers=1)
    run = replace(RUN, adapter=AdapterConfig("lora", rank=2))
    layer, head = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96, 259 * 64
    lora = 2 * (128 + 96 + 96 + 128 + 3 * 160)  # rank x (inputs + outputs)
    found = roofline(run, config, target("tpu:v5e:2x2"), 4_000_000)
    keys = sum(range(1, 129)) / 128  # of a token, in the mean
    attention = 4 * keys * 64 * 3.5
    flops = 8 * 128 * (4 * (layer + head) + 6 * lora + attention) / 4
    assert found["flops"] == pytest.approx(flops)
    assert found["compute_s"] == pytest.approx(flops / 197e12)
    assert found["link_s"] == pytest.approx(4e6 / 200e9)
    assert found["step_s"] == max(found["compute_s"], found["hbm_s"], found["link_s"])
    full = roofline(replace(RUN, adapter=AdapterConfig("full")), config, target("tpu:v5e:2x2"), 0)
    assert full["flops"] == pytest.approx(8 * 128 * (6 * (layer + head) + attention) / 4)
    block = replace(run, train=replace(run.train, remat="block"))
    again = roofline(block, config, target("tpu:v5e:2x2"), 0)
    more = 2 * (layer + head) + 2 * lora + 4 * keys * 64
    assert again["flops"] - found["flops"] == pytest.approx(8 * 128 * more / 4)
    codes = replace(run, quantize=QuantizeConfig("int8"))
    less = roofline(codes, config, target("tpu:v5e:2x2"), 0)["hbm_bytes"]
    assert 0.5 < less / found["hbm_bytes"] < 1
    narrow = config.replace(family="mistral", sliding_window=5)
    fewer = roofline(run, narrow, target("tpu:v5e:2x2"), 0)
    seen = sum(min(at, 5) for at in range(1, 129)) / 128
    less = 4 * (keys - seen) * 64 * 3.5
    assert found["flops"] - fewer["flops"] == pytest.approx(8 * 128 * less / 4)


@needs_libtpu
def test_the_attention_that_is_told_is_that_of_the_program() -> None:
    """Widened heads beyond what splash takes: the plan says blocks, and so does the program."""
    config = preset("tiny").replace(head_dim=256, num_heads=2, num_kv_heads=1, num_layers=1)
    for adapter, kernel in (
        (AdapterConfig("ffba", rank=4, extra_head_dim=16), "blocks"),
        (AdapterConfig("lora", rank=4), "splash"),
    ):
        run = replace(RUN, adapter=adapter, mesh=MeshConfig())
        devices = target("tpu:v5e:1x1").devices()
        kernel_told, reason = step_attention(run, config, make_mesh(run.mesh, devices))
        assert (kernel_told, reason == "") == (kernel, kernel == "splash")
        step = lowered_step(run, config, devices)
        assert ("tpu_custom_call" in step.as_text()) == (kernel == "splash")
        if kernel == "splash":  # the widest heads: they fit
            with no_compile_cache():
                step.compile()


@needs_libtpu
def test_slices_give_as_many_devices_each() -> None:
    """A mesh of two slices that uses two of the four devices of each."""
    run = replace(RUN, mesh=MeshConfig(data=2, fsdp=2, slices=2))
    plan = target_plan(run, preset("tiny"), target("tpu:v5e:2x2"))
    found = plan["compiled"]
    assert (plan["devices"], found["devices"]) == (4, 8)
    between = found["collectives"].pop("between slices")
    assert between > 0 and found["roofline"]["link_bytes"] == sum(found["collectives"].values())


@needs_libtpu
def test_sums_of_gradients_alone_cross_slices_and_kernels_are_gathered_one_at_a_time() -> None:
    """A ring of two sends each gradient twice, in float32. Scalars and masks are sent as tiles of
    128.
    """
    config = preset("tiny")
    run = replace(RUN, mesh=MeshConfig(data=2, fsdp=2, slices=2))
    groups = slice_groups(target("tpu:v5e:2x2").devices(2), 2)
    with no_compile_cache():
        text = compiled_step(run, config, [d for group in groups for d in group[:2]]).as_text()
    assert set(re.findall(r'transfer_type="(\w+)"', text)) == {"ALL_REDUCE"}
    program = Program(text)
    adapters = sum(map(math.prod, adapter_shapes(config, run.adapter).values()))
    assert program.collectives()["between slices"] <= 8 * adapters
    kernels = [math.prod(a + b) for a, b in kernel_shapes(config).values()]
    table = config.vocab_size * config.hidden_size
    gathered = [op for op, _ in program.runs(fused=True) if op.code.startswith("all-gather")]
    assert gathered and all(op.elements <= max(*kernels, table) for op in gathered)


@needs_libtpu
@pytest.mark.parametrize(
    "mesh", always([MeshConfig(fsdp=2), MeshConfig(tensor=2)], lambda mesh: mesh.fsdp == 2)
)
def test_collectives_grow_by_what_is_of_rank_r_alone(mesh: MeshConfig) -> None:
    """From rank 8 to 32 by the adapters, gathered in bfloat16, and their gradients, summed in
    float32; under tensor also by one sum of B T r a kernel.
    """
    config, sent, own = preset("tiny").replace(num_layers=1), [], []
    for rank in (8, 32):
        adapter = AdapterConfig("lora", rank=rank)
        run = replace(RUN, mesh=mesh, adapter=adapter)
        with no_compile_cache():
            step = compiled_step(run, config, target("tpu:v5e:2x2").devices())
        sent.append(sum(Program(step.as_text()).collectives().values()))
        own.append(6 * sum(map(math.prod, adapter_shapes(config, adapter).values())))
    products = 2 * 8 * 128 * (32 - 8) * config.num_layers * len(kernel_shapes(config))
    grown = sent[1] - sent[0]
    assert 0 < grown <= own[1] - own[0] + (products if mesh.tensor > 1 else 0), (sent, own)


@needs_libtpu
@pytest.mark.parametrize("method", ["lora", "zflora-uniform"])
def test_devices_add_up_gradients_in_float32(method: str) -> None:
    """Of a bfloat16 base, too: on many devices the last bits of a sum in bfloat16 would be lost."""
    config, adapter = preset("tiny"), AdapterConfig(method, rank=8)
    run = replace(RUN, mesh=MeshConfig(data=4), adapter=adapter)
    with no_compile_cache():
        text = compiled_step(run, config, target("tpu:v5e:2x2").devices()).as_text()
    summed: collections.Counter[str] = collections.Counter()
    for op, times in Program(text).runs(fused=True):
        if op.code.startswith("all-reduce") and not op.code.endswith("-done"):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", op.shape):
                summed[dtype] += times * math.prod(map(int, shape.split(",")))
    assert summed.keys() == {"f32"}
    assert summed["f32"] >= sum(map(math.prod, adapter_shapes(config, adapter).values()))


@needs_libtpu
def test_a_layer_sums_its_stream_four_times_under_tensor_parallelism() -> None:
    """Twice in each pass, as Megatron-LM does: after attention and MLP forward, and for the inputs
    of both backward, where the gradients of q, k, v and of gate, up are added first.
    """
    run = replace(RUN, mesh=MeshConfig(tensor=2), adapter=AdapterConfig("lora", rank=8))
    devices = target("tpu:v5e:2x2").devices()
    with no_compile_cache():
        program = Program(compiled_step(run, preset("tiny"), devices).as_text())
    rows, length, width = 8, 128, preset("tiny").hidden_size
    sums = sum(
        op.shape.count(f"bf16[{rows},{length},{width}]")
        for op, times in program.runs()
        if op.code.startswith("all-reduce") and not op.code.endswith("-done")
        if times == preset("tiny").num_layers
    )
    assert sums == 4
