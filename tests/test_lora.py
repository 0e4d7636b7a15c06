"""LoRA as PEFT has it: how A starts, dropout on its inputs; files from before either could be
chosen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import pairwise
from support.models import perturb, tiny_model
from support.sharded import OPTIM, batch, sharded_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import MeshConfig, RunConfig, from_file
from zflora_jax.experiments.info import describe
from zflora_jax.experiments.store import Job, read_result
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.hf.restore import MANIFEST
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.nn.layers import Dense
from zflora_jax.nn.llama import Llama, forward
from zflora_jax.parallel import sharding
from zflora_jax.training.trainer import eval_step, init_state, make_train_step
from zflora_jax.training.workdir import adopt

RESULTS = Path(__file__).parents[1] / "results"
LORA = AdapterConfig("lora", rank=4)
DROPPED = LORA.replace(dropout=0.3)


def shape_of(model: Model, rank: int, **changes: object) -> dict[str, np.ndarray]:
    adapter = AdapterConfig("lora", rank=rank, **changes)
    return trees.flatten(jax.device_get(init_adapters(jax.random.key(0), model, adapter)))


# --- the start ------------------------------------------------------------------------------------


def test_lora_starts_as_peft_starts_it():
    """Per kernel: the same range, spread and quantiles as the modules that PEFT itself makes; B is
    zero in both.
    """
    import peft
    import torch
    from support.huggingface import hf_model

    torch.manual_seed(3)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=256, target_modules=modules, task_type="CAUSAL_LM")
    theirs: dict[tuple[str, str], list[np.ndarray]] = {}
    for name, leaf in peft.get_peft_model(hf_model(), settings).named_parameters():
        if "lora_" in name:
            kernel, factor = name.split(".")[-4].removesuffix("_proj"), name.split(".")[-3]
            theirs.setdefault((kernel, factor.lower()), []).append(leaf.detach().numpy().ravel())
    config = tiny_model(hidden_size=48, intermediate_size=80, head_dim=12).config
    ours = shape_of(Model(config, {}), 256)
    for name, value in ours.items():
        _, _, kernel, factor = name.split("/")
        reference = np.concatenate(theirs.pop((kernel, factor)))
        assert value.size == reference.size
        if factor == "lora_b":
            assert not value.any() and not reference.any()
            continue
        bound = 1 / math.sqrt({"o": 48, "down": 80}.get(kernel, 48))
        for x in (value.astype(np.float64), reference.astype(np.float64)):
            n, std = x.size, bound / math.sqrt(3)
            assert np.abs(x).max() <= bound and np.abs(x).max() > 0.999 * bound
            # Of a uniform variable: the mean's error is std / sqrt n, the variance's 2 std^2 /
            # sqrt(5 n).
            assert abs(x.mean()) < 5 * std / math.sqrt(n)
            assert abs(x.var() / std**2 - 1) < 5 * 2 / math.sqrt(5 * n)
        at = np.linspace(0.05, 0.95, 19)
        gap = np.abs(np.quantile(value, at) - np.quantile(reference, at)) / (2 * bound)
        assert gap.max() < 5 * 0.5 * math.sqrt(2 / value.size)
    assert not theirs


def test_the_former_start_is_there_by_name():
    """Bit for bit: std 1/sqrt(in) times a normal draw keyed by the leaf's name."""
    model, key = tiny_model(), jax.random.key(0)
    for name, value in shape_of(model, 4, init="normal").items():
        _, _, kernel, factor = name.split("/")
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        std = 1 / math.sqrt({"down": 96}.get(kernel, 64))
        want = std * jax.random.normal(own, value.shape, jnp.float32)
        np.testing.assert_array_equal(value, want if factor == "lora_a" else np.zeros_like(value))
    named = shape_of(model, 4, init="kaiming_uniform")
    assert_trees_equal(shape_of(model, 4), named)


@pytest.mark.parametrize("method", ["ffba", "zflora-minimal", "zflora-uniform"])
def test_other_methods_start_normal_and_may_start_uniform(method):
    model, adapter = tiny_model(), AdapterConfig(method, rank=6)
    starts = {
        init: trees.flatten(init_adapters(jax.random.key(0), model, adapter.replace(init=init)))
        for init in (None, "normal", "kaiming_uniform")
    }
    assert_trees_equal(starts[None], starts["normal"])
    for name, leaf in starts["kaiming_uniform"].items():
        assert np.any(leaf) == np.any(starts[None][name]), name
        bound = 1 / math.sqrt(96 if "down" in name else 64)
        assert np.abs(leaf).max() <= bound and (
            not np.any(leaf) or np.abs(starts[None][name]).max() > bound
        ), name


@pytest.mark.parametrize("method", ["ffa", "full"])
def test_what_draws_nothing_has_no_start(method):
    with pytest.raises(
        ConfigError,
        match=(
            rf"adapter\.init='normal': method '{method}' draws nothing at random .*; leave init"
            r" unset"
        ),
    ):
        AdapterConfig(method, init="normal")
    with pytest.raises(
        ConfigError, match=r"adapter\.init='gaussian': .*Allowed: kaiming_uniform, normal"
    ):
        AdapterConfig("lora", init="gaussian")


# --- files from before the start could be chosen --------------------------------------------------


def without_start(config: dict) -> dict:
    return config | {
        "adapter": {k: v for k, v in config["adapter"].items() if k not in ("init", "dropout")}
    }


def test_files_without_a_start_say_normal_for_lora_alone():
    for method in METHODS:
        run = RunConfig(adapter=AdapterConfig(method))
        read = from_file(RunConfig, without_start(to_dict(run))).adapter
        assert read == from_file(AdapterConfig, without_start(to_dict(run))["adapter"])
        assert read.init == ("normal" if method == "lora" else None) and read.dropout == 0
        assert from_file(RunConfig, to_dict(run)) == run


def test_a_committed_record_is_one_of_the_former_start():
    """So a comparison of the new start makes its runs, and one of the former, by name,
    finds them.
    """
    path = RESULTS / "gsm8k_budget" / "lora-normal-lr0.001-seed0.json"
    config = json.loads(path.read_text())["config"]
    run = from_file(RunConfig, config)
    asked = {
        init: Job(
            "a", dataclasses.replace(run, adapter=AdapterConfig("lora", init=init)), path, path
        )
        for init in (None, "normal")
    }
    assert read_result(asked["normal"])["validation_loss"] > 0
    assert read_result(asked[None]) is None
    minimal = RESULTS / "gsm8k_budget" / "zflora-minimal-lr0.001-seed0.json"
    config = json.loads(minimal.read_text())["config"]
    assert read_result(Job("a", from_file(RunConfig, config), minimal, minimal)) is not None


def test_a_sweep_does_not_take_a_row_of_the_former_start(tmp_path):
    run, path = RunConfig(adapter=AdapterConfig("lora", rank=3)), tmp_path / "row.json"
    path.write_text(
        json.dumps({"config": without_start(to_dict(run)), "row": {"status": "finished"}})
    )
    asked = {
        init: Job("a", override(run, {"adapter.init": init}), tmp_path, path)
        for init in ("normal", "kaiming_uniform")
    }
    assert read_result(asked["normal"]) == {}
    assert read_result(asked["kaiming_uniform"]) is None


def test_a_run_of_the_former_start_is_resumed_without_saying_so(run, tmp_path):
    run = override(run, {"adapter.method": "lora", "train.steps": 3, "adapter.init": "normal"})
    first = train(run, tmp_path / "run", console=False)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(without_start(json.loads(path.read_text()))))
    left_open = override(run, {"adapter.init": None})
    again = train(left_open, tmp_path / "run", console=False)
    assert again.report["config"]["adapter"]["init"] == "normal"
    assert_trees_equal(again.adapters, first.adapters)
    assert json.loads(path.read_text())["adapter"]["init"] == "normal"
    with pytest.raises(ConfigError, match=r"adapter\.init: 'normal' there, 'kaiming_uniform' now"):
        train(override(run, {"adapter.init": "kaiming_uniform"}), tmp_path / "run", console=False)
    adopt(tmp_path / "run", run)


def test_an_export_from_before_is_read(tmp_path):
    model = tiny_model()
    fused = fuse(model, LORA, perturb(init_adapters(jax.random.key(0), model, LORA)))
    save_hf(tmp_path, fused)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(without_start(manifest)))
    assert load_model(str(tmp_path)).adapter == LORA.replace(init="normal")
    assert describe(tmp_path)["method"] == "lora"


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_only_lora_has_dropout(method):
    with pytest.raises(
        ConfigError,
        match=(
            rf"adapter\.dropout=0\.1: only method 'lora' has dropout, .* method '{method}' has none"
        ),
    ):
        AdapterConfig(method, dropout=0.1)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
def test_a_dropout_is_a_share(dropout):
    with pytest.raises(
        ConfigError,
        match=rf"adapter\.dropout={dropout}: a share of inputs, so at least 0 and below 1",
    ):
        AdapterConfig("lora", dropout=dropout)


def test_dropout_keeps_a_share_of_the_inputs_and_divides_by_it():
    """Through factors that are the identity the output is what A sees; its gradient is that of what
    A saw.
    """
    adapter, n = AdapterConfig("lora", rank=64, alpha=64.0, dropout=0.3), 64
    dense = Dense((n,), (n,), adapter, ("lora_a", "lora_b"))
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, 32, n)), jnp.float32)
    variables = {
        "params": {"kernel": jnp.zeros((n, n))},
        "adapters": {"lora_a": jnp.eye(n), "lora_b": jnp.eye(n)},
    }

    def seen(key: int) -> jax.Array:
        return dense.apply(variables, x, rngs={"dropout": jax.random.key(key)})[0]

    y = np.asarray(seen(0))
    stays = y != 0
    np.testing.assert_allclose(y[stays], (x / 0.7)[stays], rtol=1e-6)
    assert abs(stays.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / stays.size)
    # The spread of x itself adds a little.
    assert abs(y.mean() / x.mean() - 1) < 5 * math.sqrt(0.3 / 0.7 / y.size) * 1.1
    for axis in ((0, 1), (0, 2), (1, 2)):  # no row, position or channel is left out as a whole
        share = stays.mean(axis)
        assert share.min() > 0.4 and share.max() < 0.95 and share.std() > 0
    np.testing.assert_array_equal(seen(0), y)
    assert np.any((np.asarray(seen(1)) != 0) != stays)
    # Without a stream, nothing drops out.
    np.testing.assert_array_equal(dense.apply(variables, x)[0], x)

    d_y = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)

    def loss(a: jax.Array) -> jax.Array:
        given = {**variables, "adapters": {"lora_a": a, "lora_b": jnp.eye(n)}}
        return jnp.sum(dense.apply(given, x, rngs={"dropout": jax.random.key(0)})[0] * d_y)

    want = y.reshape(-1, n).astype(np.float64).T @ d_y.reshape(-1, n)
    np.testing.assert_allclose(
        jax.grad(loss)(jnp.eye(n)), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize(("scan_layers", "remat"), pairwise([True, False], [True, False]))
def test_every_kernel_of_every_layer_drops_inputs_of_its_own(scan_layers, remat):
    model = tiny_model(scan_layers=scan_layers, remat=remat)
    adapters = perturb(init_adapters(jax.random.key(0), model, DROPPED))
    masks: list[bytes] = []

    def record(dropped, args, kwargs, context):
        y = dropped(*args, **kwargs)
        if context.method_name == "_dropped":
            jax.debug.callback(
                lambda mask: masks.append(np.packbits(mask[:, :, :64]).tobytes()), y != 0
            )
        return y

    tokens, variables = jnp.ones((2, 5), jnp.int32), {"params": model.params, "adapters": adapters}
    with nn.intercept_methods(record):
        Llama(model.config, DROPPED).apply(variables, tokens, rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    assert len(masks) == 14 and len(set(masks)) == 14


def test_evaluation_and_generation_drop_nothing():
    model = tiny_model()
    adapters, tokens = (
        perturb(init_adapters(jax.random.key(0), model, LORA)),
        np.ones((2, 9), np.int32),
    )
    np.testing.assert_array_equal(
        forward(model, tokens, DROPPED, adapters), forward(model, tokens, LORA, adapters)
    )
    rows = {"tokens": tokens, "loss_mask": tokens > 0, "segments": tokens}
    variables = {"params": model.params, "adapters": adapters}
    losses = [float(eval_step(model.config, a, variables, rows, 8)[0]) for a in (DROPPED, LORA)]
    assert losses[0] == losses[1]
    answers = [
        generate_tokens(model, [[5, 6]], max_new_tokens=4, adapter=a, adapters=adapters)
        for a in (DROPPED, LORA)
    ]
    assert answers[0] == answers[1]
    assert_logits_close(
        forward(fuse(model, DROPPED, adapters), tokens), forward(model, tokens, LORA, adapters)
    )


def steps_of(
    adapter: AdapterConfig,
    mesh_config: MeshConfig | None = None,
    *,
    seed: int = 0,
    accumulate: int = 2,
    rows: dict[str, np.ndarray] | None = None,
    rate: float = 1e-2,
    **changes: object,
) -> list[list[float]]:
    """Loss and norm of the gradient of three steps."""
    model, optim = (
        sharded_model(num_layers=1, **changes),
        dataclasses.replace(OPTIM, learning_rate=rate),
    )
    state = init_state(
        perturb(init_adapters(jax.random.key(0), model, adapter), 1, 0.05), optim, 10
    )
    mesh = sharding.make_mesh(mesh_config or MeshConfig())
    where = sharding.state_shardings(state, mesh)
    step = make_train_step(model.config, adapter, optim, 10, accumulate, 32, where, seed)
    placed, params = (
        jax.device_put(rows or batch(), sharding.batch_sharding(mesh)),
        sharding.shard(model.params, mesh),
    )
    state, losses = jax.device_put(state, where), []
    with jax.set_mesh(mesh):
        for _ in range(3):
            state, metrics = step(params, state, placed)
            losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return losses


def test_what_drops_out_hangs_neither_on_the_mesh_nor_on_recomputation():
    wanted = np.asarray(steps_of(DROPPED))
    np.testing.assert_allclose(
        steps_of(DROPPED, MeshConfig(2, 2, 2), remat=True), wanted, rtol=2e-5
    )
    assert np.abs(np.asarray(steps_of(DROPPED, seed=1)) / wanted - 1).max() > 1e-3


def test_micro_batches_and_steps_drop_other_inputs():
    """The same row again, and a rate too low to change a parameter: without dropout all losses
    would be one.
    """
    row = jax.tree.map(lambda x: x[:1], batch())
    twice = jax.tree.map(lambda x: x.repeat(2, 0), row)
    alone = [loss for loss, _ in steps_of(DROPPED, accumulate=1, rows=row, rate=1e-30)]
    both = [loss for loss, _ in steps_of(DROPPED, accumulate=2, rows=twice, rate=1e-30)]
    assert len({round(loss, 5) for loss in alone}) == 3  # steps
    # The second micro-batch is not the first again.
    assert np.abs(np.asarray(both) - alone).min() > 1e-5


def test_without_dropout_nothing_is_drawn():
    def text(adapter: AdapterConfig) -> str:
        model = sharded_model(num_layers=1)
        state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 10)
        return (
            make_train_step(model.config, adapter, OPTIM, 10, 2, 32)
            .lower(model.params, state, batch())
            .as_text()
        )

    assert "threefry" in text(DROPPED) and "threefry" not in text(LORA)


def test_a_run_with_dropout_resumes_bit_for_bit(run, tmp_path):
    run = override(run, {"adapter.method": "lora", "adapter.dropout": 0.2, "train.max_to_keep": 4})
    whole = train(run, tmp_path / "whole", console=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / str(step))
    half = train(run, tmp_path / "half", console=False)
    assert half.report["resumed_from"] == 4
    assert_trees_equal(half.adapters, whole.adapters)
    assert half.report["test_loss"] == whole.report["test_loss"]


def test_peft_directories_carry_the_dropout(tmp_path):
    import peft

    model, adapter = tiny_model(), DROPPED.replace(alpha=6.0)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    save_peft(tmp_path, model, adapter, adapters)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).lora_dropout == 0.3
    assert load_peft(tmp_path, model)[0] == adapter
    assert describe(tmp_path)["lora_dropout"] == "0.3"
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for value in (None, 0):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(settings | {"lora_dropout": value})
        )
        assert load_peft(tmp_path, model)[0].dropout == 0
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 2}))
    with pytest.raises(ConfigError, match=r"adapter\.dropout=2\.0: a share of inputs"):
        load_peft(tmp_path, model)
