"""LoRA drops inputs in training alone, the same ones on every mesh and after a resume."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from support.cases import LORA
from support.checks import assert_logits_close
from support.huggingface import TOKENS, hf_logits, hf_model
from support.models import perturb, tiny_model
from support.sharded import OPTIM, batch, sharded_model, three_steps

from zflora_jax import ConfigError, Llama, LowRank, forward, fuse, load_model, load_peft, save_peft
from zflora_jax.adapters.init import init_adapters
from zflora_jax.config import AdapterConfig, MeshConfig
from zflora_jax.core import trees
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.nn.layers import Dense
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import eval_step

DROPPED = LORA.replace(dropout=0.3)


def test_dropout_keeps_a_share_of_the_inputs_and_divides_by_it():
    """Through factors that are the identity, output and gradient show what A sees."""
    n = 64
    dense = Dense((n,), (n,), LowRank((n,), (n,), 1.0, n, dropout=0.3))
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, 32, n)), jnp.float32)
    variables = {"params": {"kernel": jnp.zeros((n, n))}}
    variables |= {"adapters": {"lora_a": jnp.eye(n), "lora_b": jnp.eye(n)}}

    def seen(key: int) -> jax.Array:
        return dense.apply(variables, x, rngs={"dropout": jax.random.key(key)})[0]

    y = np.asarray(seen(0))
    stays = y != 0
    np.testing.assert_allclose(y[stays], (x / 0.7)[stays], rtol=1e-6)
    assert abs(stays.mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / stays.size)
    for axis in ((0, 1), (0, 2), (1, 2)):  # no row, position or channel is left out as a whole
        assert stays.mean(axis).min() > 0.4 and stays.mean(axis).max() < 0.95
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


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "block"), (False, "dots")])
def test_every_kernel_of_every_layer_drops_inputs_of_its_own(scan_layers, remat):
    model = tiny_model(scan_layers=scan_layers, remat=remat)
    adapters = perturb(init_adapters(jax.random.key(0), model, DROPPED))
    masks: list[bytes] = []

    def keep(y):
        y = np.asarray(y)  # an operation of jax would wait for the program that waits for it
        masks.append(np.packbits(y[:, :, :64] != 0).tobytes())
        return np.zeros_like(y)

    def record(dropped, args, kwargs, context):
        y = dropped(*args, **kwargs)
        if context.method_name == "_dropped":
            # In y, not as an effect: flax refuses effects of what a scanned layer computes.
            y = y + jax.pure_callback(keep, jax.ShapeDtypeStruct(y.shape, y.dtype), y)
        return y

    tokens, variables = jnp.ones((2, 5), jnp.int32), {"params": model.params, "adapters": adapters}
    with nn.intercept_methods(record):
        rngs = {"dropout": jax.random.key(0)}
        Llama(model.config, DROPPED).apply(variables, tokens, rngs=rngs).block_until_ready()
    assert len(masks) == 14 and len(set(masks)) == 14


def test_evaluation_and_generation_drop_nothing():
    model = tiny_model()
    adapters = perturb(init_adapters(jax.random.key(0), model, LORA))
    tokens = np.ones((2, 9), np.int32)
    wanted = forward(model, tokens, LORA, adapters)
    np.testing.assert_array_equal(forward(model, tokens, DROPPED, adapters), wanted)
    rows = {"tokens": tokens, "loss_mask": tokens > 0, "segments": tokens}
    variables = {"params": model.params, "adapters": adapters}

    def found(adapter):
        sums = eval_step(model.config, adapter, variables, rows, CrossEntropy(8))
        given = {"adapter": adapter, "adapters": adapters}
        return float(sums.loss), generate_tokens(model, [[5, 6]], max_new_tokens=4, **given)

    assert found(DROPPED) == found(LORA)
    assert_logits_close(forward(fuse(model, DROPPED, adapters), tokens), wanted)


def steps_of(adapter, mesh=MeshConfig(), rows=None, *, rate=1e-2, remat="dots", **settings):  # noqa: B008
    """Loss and norm of the gradient of three steps, of two micro-batches each."""
    model = sharded_model(num_layers=1, remat=remat)
    settings = {"grad_accum_steps": 2, "std": 0.05} | settings
    optim = dataclasses.replace(OPTIM, learning_rate=rate)
    return three_steps(model, adapter, mesh, rows, optim=optim, **settings)[0][:, :2]


@pytest.mark.soak
def test_what_drops_out_hangs_neither_on_the_mesh_nor_on_recomputation():
    wanted = steps_of(DROPPED)
    np.testing.assert_allclose(
        steps_of(DROPPED, MeshConfig(2, 2, 2), remat="block"), wanted, rtol=2e-5
    )
    assert np.abs(steps_of(DROPPED, seed=1) / wanted - 1).max() > 1e-3


@pytest.mark.soak  # every kernel and layer has its own
def test_micro_batches_and_steps_drop_other_inputs():
    """Without dropout, the same row at a rate too low to change a parameter has one loss."""
    row = jax.tree.map(lambda x: x[:1], batch())
    twice = jax.tree.map(lambda x: x.repeat(2, 0), row)
    alone = steps_of(DROPPED, rows=row, rate=1e-30, grad_accum_steps=1)[:, 0]
    both = steps_of(DROPPED, rows=twice, rate=1e-30)[:, 0]
    assert len({round(loss, 5) for loss in alone.tolist()}) == 3
    assert np.abs(both - alone).min() > 1e-5


def test_peft_directories_carry_the_dropout(tmp_path):
    model, adapter = tiny_model(), DROPPED.replace(alpha=6.0)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    save_peft(tmp_path, model, adapter, adapters)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)).lora_dropout == 0.3
    assert load_peft(tmp_path, model)[0] == adapter
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"lora_dropout": None}))
    assert load_peft(tmp_path, model)[0].dropout == 0
    file.write_text(json.dumps(settings | {"lora_dropout": 2}))
    with pytest.raises(ConfigError, match=r"adapter\.dropout=2\.0: must be at least 0 and below 1"):
        load_peft(tmp_path, model)


# --- parity with peft -----------------------------------------------------------------------------


class Half(torch.nn.Module):
    """Half of every input in place of a random choice."""

    def forward(self, x: Any) -> Any:
        return 0.5 * x


def test_dropout_drops_what_peft_drops(tmp_path, monkeypatch):
    """With DoRA, whose norms scale the base's product of dropped inputs."""
    hf_model(head_dim=16).save_pretrained(tmp_path)
    given = {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.5}
    config = peft.LoraConfig(r=4, lora_alpha=6, **given)
    theirs = peft.get_peft_model(hf_model(head_dim=16), config).train()
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Half()

    adapter = AdapterConfig("lora", rank=4, alpha=6.0, dropout=0.5, use_dora=True)
    base = load_model(tmp_path)
    leaves = trees.flatten(init_adapters(jax.random.key(0), base, adapter))
    monkeypatch.setattr(Dense, "_dropped", lambda self, x, share: (1 - share) * x)
    leaves = {n: 1.3 * x if n.endswith("magnitude") else x for n, x in leaves.items()}
    variables = {"params": base.params, "adapters": trees.unflatten(leaves)}
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(Llama(base.config, adapter).apply(variables, jnp.asarray(TOKENS)))
    assert_logits_close(hf_logits(theirs), ours)
    assert np.abs(ours - np.asarray(forward(base, jnp.asarray(TOKENS)))).max() > 0.1
