"""LoRA drops inputs in training alone, the same ones on every mesh and after a resume."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import LORA
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import pairwise
from support.models import perturb, tiny_model
from support.sharded import OPTIM, batch, sharded_model, three_steps

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.kernel_adapter import LowRank
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.experiments.info import describe
from zflora_jax.experiments.train import train
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.nn.layers import Dense
from zflora_jax.nn.llama import Llama, forward
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import eval_step, init_state, make_train_step

DROPPED = LORA.replace(dropout=0.3)


@pytest.mark.parametrize(
    ("method", "dropout", "message"),
    [
        (
            m,
            0.1,
            rf"adapter\.dropout=0\.1: only method 'lora' has it; method '{m}' does not",
        )
        for m in METHODS
        if m != "lora"
    ]
    + [
        ("lora", p, rf"adapter\.dropout={p}: a share of inputs, so at least 0 and below 1")
        for p in (-0.1, 1.0, 1.5)
    ],
)
def test_a_dropout_is_a_share_and_only_loras(method, dropout, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(method, dropout=dropout)


def test_dropout_keeps_a_share_of_the_inputs_and_divides_by_it():
    """Through factors that are the identity the output is what A sees; its gradient is that of what
    A saw.
    """
    n = 64
    dense = Dense((n,), (n,), LowRank((n,), (n,), 1.0, n, dropout=0.3))
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
    found = jax.grad(loss)(jnp.eye(n))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("scan_layers", "remat"), pairwise([True, False], ["dots", "block"]))
def test_every_kernel_of_every_layer_drops_inputs_of_its_own(scan_layers, remat):
    model = tiny_model(scan_layers=scan_layers, remat=remat)
    adapters = perturb(init_adapters(jax.random.key(0), model, DROPPED))
    masks: list[bytes] = []

    def keep(mask):
        masks.append(np.packbits(mask[:, :, :64]).tobytes())

    def record(dropped, args, kwargs, context):
        y = dropped(*args, **kwargs)
        if context.method_name == "_dropped":
            jax.debug.callback(keep, y != 0)
        return y

    tokens, variables = jnp.ones((2, 5), jnp.int32), {"params": model.params, "adapters": adapters}
    with nn.intercept_methods(record):
        Llama(model.config, DROPPED).apply(variables, tokens, rngs={"dropout": jax.random.key(0)})
    jax.effects_barrier()
    assert len(masks) == 14 and len(set(masks)) == 14


def test_evaluation_and_generation_drop_nothing():
    model = tiny_model()
    adapters = perturb(init_adapters(jax.random.key(0), model, LORA))
    tokens = np.ones((2, 9), np.int32)
    wanted = forward(model, tokens, LORA, adapters)
    np.testing.assert_array_equal(forward(model, tokens, DROPPED, adapters), wanted)
    rows = {"tokens": tokens, "loss_mask": tokens > 0, "segments": tokens}
    variables = {"params": model.params, "adapters": adapters}
    found = []
    for adapter in (DROPPED, LORA):
        sums = eval_step(model.config, adapter, variables, rows, CrossEntropy(8))
        given = {"adapter": adapter, "adapters": adapters}
        found.append(
            (float(sums.loss), generate_tokens(model, [[5, 6]], max_new_tokens=4, **given))
        )
    assert found[0] == found[1]
    assert_logits_close(forward(fuse(model, DROPPED, adapters), tokens), wanted)


def steps_of(adapter, mesh=MeshConfig(), rows=None, *, rate=1e-2, remat="dots", **settings):  # noqa: B008
    """Loss and norm of the gradient of three steps, of two micro-batches each."""
    model = sharded_model(num_layers=1, remat=remat)
    settings = {"grad_accum_steps": 2, "std": 0.05} | settings
    optim = dataclasses.replace(OPTIM, learning_rate=rate)
    return three_steps(model, adapter, mesh, rows, optim=optim, **settings)[0][:, :2]


def test_what_drops_out_hangs_neither_on_the_mesh_nor_on_recomputation():
    wanted = steps_of(DROPPED)
    np.testing.assert_allclose(
        steps_of(DROPPED, MeshConfig(2, 2, 2), remat="block"), wanted, rtol=2e-5
    )
    assert np.abs(steps_of(DROPPED, seed=1) / wanted - 1).max() > 1e-3


def test_micro_batches_and_steps_drop_other_inputs():
    """The same row again, and a rate too low to change a parameter: without dropout all losses
    would be one.
    """
    row = jax.tree.map(lambda x: x[:1], batch())
    twice = jax.tree.map(lambda x: x.repeat(2, 0), row)
    alone = steps_of(DROPPED, rows=row, rate=1e-30, grad_accum_steps=1)[:, 0]
    both = steps_of(DROPPED, rows=twice, rate=1e-30)[:, 0]
    assert len({round(loss, 5) for loss in alone.tolist()}) == 3  # steps
    # The second micro-batch is not the first again.
    assert np.abs(both - alone).min() > 1e-5


def test_without_dropout_nothing_is_drawn():
    def text(adapter: AdapterConfig) -> str:
        model = sharded_model(num_layers=1)
        state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 10)
        step = make_train_step(model.config, adapter, OPTIM, 10, grad_accum_steps=2)
        return step.lower(model.params, state, batch()).as_text()

    assert "threefry" in text(DROPPED) and "threefry" not in text(LORA)


@pytest.mark.soak  # twins: the tests of draws here, and test_killed_runs
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
    assert describe(tmp_path)["lora_dropout"] == 0.3
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    for value in (None, 0):
        file.write_text(json.dumps(settings | {"lora_dropout": value}))
        assert load_peft(tmp_path, model)[0].dropout == 0
    file.write_text(json.dumps(settings | {"lora_dropout": 2}))
    with pytest.raises(ConfigError, match=r"adapter\.dropout=2\.0: a share of inputs"):
        load_peft(tmp_path, model)
