"""Small models whose outputs vary, adapters that are not zero, what attention is given."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax import AdapterConfig, LlamaConfig, Model, fuse, init_adapters, preset
from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.ops.attention_mask import AttentionMask


def perturb(tree: trees.Tree, seed: int = 1, std: float = 0.1) -> trees.Tree:
    """`tree` plus noise at every leaf: zero blocks would hide a wrong sign, scale or place."""
    rng = np.random.default_rng(seed)

    def noisy(_: str, x: jax.Array) -> jax.Array:
        # Added by numpy: every shape of a jax operation is a program to compile.
        value = np.asarray(x) + (std * rng.standard_normal(x.shape)).astype(x.dtype)
        return jax.device_put(value, x.sharding if x.committed else None)

    return trees.map_with_names(noisy, tree)


def tiny_model(seed: int = 0, **changes: object) -> Model:
    """A tiny Model with kernels large enough that all of them matter, norm gains that are not 1 and
    biases that are not 0. Untied, its greedy output varies too.
    """
    config = preset("tiny").replace(**changes)
    arrays = jax.tree.map(np.array, _tiny_params(config, seed))  # a test may donate them
    return Model(config, jax.device_put(arrays))


@cache
def _tiny_params(config: LlamaConfig, seed: int) -> trees.Tree:
    # By numpy: the initialisers of a model take a second to compile.
    rng = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith(("scale", "bias")):
            return 0.2 * values + name.endswith("scale")
        return (0.1 if "layers" in name else 0.4) * values

    shapes = param_shapes(config)
    return trees.unflatten({name: drawn(name, shape) for name, shape in shapes.items()})


def narrow_and_wide(**changes: object) -> tuple[Model, Model]:
    """A tiny model in bfloat16, and the same numbers computed with in float32."""
    model = tiny_model(seed=1, **changes)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    return Model(model.config.replace(dtype="bfloat16"), rounded), Model(model.config, wide)


def untied(**changes: object) -> Model:
    """A tiny model whose greedy output goes on changing: with tied embeddings it soon repeats the
    token it was given.
    """
    return tiny_model(seed=1, tie_word_embeddings=False, **changes)


def tiny_fused(method: str) -> Model:
    """The base, or fused with every adapter leaf perturbed."""
    model = untied()
    if method == "base":
        return model
    adapter = AdapterConfig(method, rank=6, alpha=9.0)
    return fuse(model, adapter, perturb(init_adapters(jax.random.key(1), model, adapter)))


def attention_inputs(
    kind: str = "causal", T: int = 12, S: int = 12, H: int = 6, K: int = 2, k: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray, AttentionMask]:
    """Queries [2, T, H, k], keys and values of S slots, and what attends to what.

    Args:
      kind: "causal"; padding "left" or "right"; "filler", a row of padding alone; "packed" rows;
        "cache", where the queries follow S - T slots, one of which is padding.
    """
    draw = np.random.default_rng(0)
    q, keys, values = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in ((2, T, H, k), (2, K, k, S), (2, K, S, k))
    )
    slot = np.arange(T)[None]
    lengths = np.array([[T], [2 * T // 3]])
    segments = {
        "causal": None,
        "left": slot >= T - lengths,
        "right": slot < lengths,
        "filler": slot < np.array([[T], [0]]),
        "packed": np.where(slot < lengths, 1 + slot * np.array([[3], [5]]) // T, 0).astype(
            np.int32
        ),
    }
    if kind != "cache":
        ids = segments[kind]
        ids = None if ids is None else jnp.asarray(ids)
        return q, keys, values, AttentionMask(ids, ids)
    valid = jnp.ones((2, S), bool).at[1, 2].set(S == T)
    return q, keys, values, AttentionMask(None, valid, jnp.int32(S - T))
