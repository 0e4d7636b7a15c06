"""Stock form stores the state times eps_z because a joint norm sees it: the effect is measured, in
transformers and at step 0.
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
from zflora_jax.hf.load import load_model
from zflora_jax.hf.stock import to_stock
from zflora_jax.nn.llama import forward

MINIMAL = AdapterConfig("zflora-minimal", rank=16)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
TEXT = "Q: A farmer has 12 cows and buys 30 more. How many cows are there now?\nA: 12 + 30 = 42."


def gaps(
    base: Model, adapter: AdapterConfig, std: float, tokens: np.ndarray, exponents: list[int]
) -> tuple[dict[int, float], float]:
    """n -> max |dlogit| of stock transformers with eps_z = 2^-n against our fused model; and the
    logits' scale. Forward is as initialised, so that the state has the size it has in training;
    backward and cross are not zero, so that the state is read.
    """
    rng = np.random.default_rng(1)

    def noisy(name: str, x: jax.Array) -> jax.Array:
        if name.endswith("forward"):
            return x
        return x + jnp.asarray(std * rng.standard_normal(x.shape), x.dtype)

    start = init_adapters(jax.random.key(0), base, adapter)
    model = fuse(base, adapter, trees.map_with_names(noisy, start))
    want = np.asarray(forward(model, jnp.asarray(tokens)), np.float64)
    llama, found = None, {}
    for n in exponents:
        stored = to_stock(model, "float32", 2.0**-n)
        tensors = {name: np.ascontiguousarray(stored.tensor(name)) for name in stored.specs}
        # eps_z changes tensors only.
        config = transformers.LlamaConfig(**stored.config)
        llama = llama or transformers.LlamaForCausalLM(config).eval()
        missing, unexpected = llama.load_state_dict(
            {name: torch.from_numpy(x) for name, x in tensors.items()}, strict=False
        )
        assert set(missing) <= {"lm_head.weight"} and not unexpected
        with torch.no_grad():
            got = llama(torch.tensor(tokens, dtype=torch.long)).logits.double().numpy()
        found[n] = float(np.abs(got - want).max())
    return found, float(np.abs(want).max())


def test_eps_z_on_a_tiny_model() -> None:
    base = tiny_model(num_layers=3, tie_word_embeddings=False)
    gap, scale = gaps(base, MINIMAL, 0.05, TOKENS, [0, 4, 10])
    assert gap[0] > 0.01 * scale, "eps_z = 1 is another function"
    assert gap[0] > 100 * gap[4] > 100 * gap[10]
    assert gap[10] <= TOLERANCE * scale < gap[4]


@needs_smollm2
@pytest.mark.soak
def test_eps_z_on_a_real_model() -> None:
    base = load_model("smollm2-135m")
    tokens = np.asarray([base.tokenizer(TEXT)["input_ids"]])
    adapter = AdapterConfig("zflora-minimal", rank=18, extra_mlp_units=24)
    gap, scale = gaps(base, adapter, 0.005, tokens, [0, 4, 8, 10])
    print("measured", gap, scale)
    assert gap[0] > 100 * gap[10] and gap[0] > 10 * gap[4] > 10 * gap[10]
    assert gap[8] <= TOLERANCE * scale and gap[10] <= TOLERANCE * scale


@pytest.mark.parametrize("tied", [True, False])
def test_a_joint_norm_changes_the_model_at_step_0(tied: bool) -> None:
    """At step 0 the state is written and not yet read. Our norm leaves the base's function as it
    is; counting the state in the mean square would not.
    """
    model = tiny_model(num_layers=3, tie_word_embeddings=tied)
    want = np.asarray(forward(model, TOKENS))
    fused = fuse(model, MINIMAL, init_adapters(jax.random.key(0), model, MINIMAL))
    d, wide = fused.config.norm_dim, fused.config.hidden_size
    share, state = d / wide, wide - d
    tables = {"embed/embedding": ((0, 0), (0, state)), "lm_head/kernel": ((0, state), (0, 0))}

    def error(model: Model) -> float:
        return float(np.abs(np.asarray(forward(model, TOKENS)) - want).max() / np.abs(want).max())

    def widened(name: str, x: jax.Array) -> jax.Array:
        """The leaf of an ordinary model of this width, with its gains as stock form has them."""
        if name.endswith("scale"):
            return x * math.sqrt(share)
        return jnp.pad(x, tables[name]) if name in tables else x

    def silent(name: str, x: jax.Array) -> jax.Array:
        written = name.endswith(("o/kernel", "down/kernel"))
        return x.at[..., d:].set(0) if written else x

    joint = trees.map_with_names(widened, fused.params)
    eps = fused.config.rms_norm_eps * share
    config = fused.config.replace(base_hidden_size=None, rms_norm_eps=eps)
    assert error(fused) <= TOLERANCE
    assert error(Model(config, joint)) > 0.01
    assert error(Model(config, trees.map_with_names(silent, joint))) <= TOLERANCE
