"""Why the stock form stores the state times eps_z, and why the norm runs over the base channels:
the simpler alternatives are measured to be wrong.

Design.md section 2, SmolLM2-135M, largest |dlogit| between stock transformers and the
norm-over-base forward: 0.33 at eps_z = 1, about 1e-3 at 2^-4, and what float32 rounding leaves at
2^-8 and below. tests/test_state_scale.py tests how eps_z is chosen.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checks import TOLERANCE
from support.models import needs_smollm2, tiny_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.hf import stock
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.load import load_model
from zflora_jax.nn.layers import RMSNorm
from zflora_jax.nn.llama import forward

MINIMAL = AdapterConfig("zflora-minimal", rank=16)


def with_state(model: Model, adapter: AdapterConfig, std: float) -> Model:
    """Fused with forward as it is initialised, so that the state has the size it has in training,
    and backward and cross not zero: the state is read, and an error in it is seen.
    """
    return fuse(
        model,
        adapter,
        trees.map_with_names(noise(std), init_adapters(jax.random.key(0), model, adapter)),
    )


def noise(std: float):
    rng = np.random.default_rng(1)
    return lambda name, x: (
        x
        if name.endswith("forward")
        else x + jnp.asarray(std * rng.standard_normal(x.shape), x.dtype)
    )


def gaps(model: Model, tokens: np.ndarray, exponents: list[int]) -> tuple[dict[int, float], float]:
    """n -> max |dlogit| of stock transformers on the stock form with eps_z = 2^-n against our
    forward of the fused model; and the logits' scale.
    """
    want = np.asarray(forward(model, jnp.asarray(tokens)), np.float64)
    llama, found = None, {}
    for n in exponents:
        form = stock.stock_form(model, "float32", 2.0**-n)
        config, tensor = stock.to_stock(model, form, "float32")
        tensors = {name: np.ascontiguousarray(tensor(name)) for name in hf_table(model.config)}
        # eps_z changes tensors alone.
        llama = llama or transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
        missing, unexpected = llama.load_state_dict(
            {name: torch.from_numpy(x) for name, x in tensors.items()}, strict=False
        )
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        with torch.no_grad():
            got = llama(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()
        found[n] = float(np.abs(got - want).max())
    return found, float(np.abs(want).max())


def test_eps_z_on_a_tiny_model() -> None:
    model = with_state(tiny_model(num_layers=3, tie_word_embeddings=False), MINIMAL, 0.05)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    gap, scale = gaps(model, tokens, [0, 4, 10])
    assert gap[0] > 0.01 * scale, "eps_z = 1 is another function"
    assert gap[0] > 100 * gap[4] > 100 * gap[10]
    assert gap[10] <= TOLERANCE * scale < gap[4]


@needs_smollm2
@pytest.mark.soak
def test_eps_z_on_a_real_model() -> None:
    base = load_model("smollm2-135m")
    tokens = np.asarray(
        [
            base.tokenizer(
                "Q: A farmer has 12 cows and buys 30 more. How many cows are there now?\nA: 12 + 30"
                " = 42."
            )["input_ids"]
        ]
    )
    gap, scale = gaps(
        with_state(base, AdapterConfig("zflora-minimal", rank=18, extra_mlp_units=24), 0.005),
        tokens,
        [0, 4, 8, 10],
    )
    print("measured", gap, scale)
    assert gap[0] > 100 * gap[10] and gap[0] > 10 * gap[4] > 10 * gap[10]
    assert gap[8] <= TOLERANCE * scale and gap[10] <= TOLERANCE * scale


def normed(
    x: np.ndarray, z: np.ndarray, norm_dim: int, eps: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    """RMSNorm of channels side by side, as in a fused model, with the mean square over the first
    `norm_dim`: (base part, state part). The joint norm is norm_dim = d + r, its gain and eps those
    of the stock form.
    """
    d, wide = x.shape[-1], np.concatenate([x, z], axis=-1)
    share = d / norm_dim
    norm = RMSNorm(wide.shape[-1], norm_dim, eps * share)
    y = np.asarray(
        norm.apply(
            {"params": {"scale": jnp.full(wide.shape[-1], math.sqrt(share), jnp.float32)}},
            jnp.asarray(wide),
        )[0]
    )
    return y[..., :d], y[..., d:]


def test_the_norm_of_base_channels_does_not_see_the_state() -> None:
    rng = np.random.default_rng(0)
    x, z = (
        rng.standard_normal((2, 5, 48)).astype(np.float32),
        rng.standard_normal((2, 5, 8)).astype(np.float32),
    )
    alone, _ = RMSNorm(48, 48, 1e-5).apply({"params": {"scale": jnp.ones(48)}}, jnp.asarray(x))
    for size in (0.0, 0.1, 1.0, 1000.0):
        base, state = normed(x, size * z, norm_dim=48)
        np.testing.assert_array_equal(base, alone)
        apart, z_apart = RMSNorm(48, 48, 1e-5).apply(
            {"params": {"scale": jnp.ones(48)}}, jnp.asarray(x), jnp.asarray(size * z)
        )
        np.testing.assert_array_equal(apart, alone)  # training form: the streams kept apart
        np.testing.assert_allclose(z_apart, state, rtol=3e-7)
    joint = {
        size: np.abs(normed(x, size * z, norm_dim=56)[0] - alone).max() / np.abs(alone).max()
        for size in (0.0, 2.0**-10, 0.1, 1.0)
    }
    assert joint[0.0] < 1e-6, "without a state the two agree: what follows is the state's doing"
    assert joint[2.0**-10] < 1e-6 and joint[0.1] > 1e-4 and joint[1.0] > 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_a_joint_norm_changes_the_model_at_step_0(tied: bool) -> None:
    """At step 0 the state is written and not yet read. Our norm leaves the base's function alone;
    counting the state in the mean square would not.
    """
    model = tiny_model(num_layers=3, tie_word_embeddings=tied)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    want = np.asarray(forward(model, tokens))
    fused = fuse(model, MINIMAL, init_adapters(jax.random.key(0), model, MINIMAL))
    assert np.abs(np.asarray(forward(fused, tokens)) - want).max() <= TOLERANCE * np.abs(want).max()

    share = fused.config.norm_dim / fused.config.hidden_size
    state = fused.config.hidden_size - fused.config.norm_dim

    def widened(name: str, x: jax.Array) -> jax.Array:
        """The leaf of an ordinary model of this width, with its gains as stock form has them."""
        if name.endswith("scale"):
            return x * math.sqrt(share)
        tables = {"embed/embedding": ((0, 0), (0, state)), "lm_head/kernel": ((0, state), (0, 0))}
        return jnp.pad(x, tables[name]) if name in tables else x

    gains = trees.map_with_names(widened, fused.params)
    joint = Model(
        fused.config.replace(base_hidden_size=None, rms_norm_eps=fused.config.rms_norm_eps * share),
        gains,
    )
    assert np.abs(np.asarray(forward(joint, tokens)) - want).max() > 0.01 * np.abs(want).max()
    silent = trees.map_with_names(
        lambda name, x: (
            x.at[..., fused.config.norm_dim :].set(0)
            if name.endswith(("o/kernel", "down/kernel"))
            else x
        ),
        gains,
    )
    assert (
        np.abs(np.asarray(forward(Model(joint.config, silent), tokens)) - want).max()
        <= TOLERANCE * np.abs(want).max()
    )
