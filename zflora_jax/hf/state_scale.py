"""eps_z: the power of two by which stock form scales the residual state, chosen from the weights.

A stock norm counts the scaled state in its mean square, so its output is smaller by a relative
eps_z^2 share / 2, where share = |z|^2 / |x|^2 of the native state and base channels. A large eps_z
disturbs the norms. A small one divides the rows that read the state by a small number, and software
with one int8 scale per channel or token then rounds the base's weights away.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.quantized import float_values

CHOICES = tuple(2.0**-k for k in range(11))  # 1, 1/2, ... 2^-10
# Rows that read the state are divided by eps_z; below this they leave the range of float16.
FLOAT16_LEAST = 2.0**-4

# The relative error of the logits that eps_z may cause. For float32 it is the error of rounding in
# the logits of a whole model (SmolLM2-135M: 1.8e-6 of the largest), a fifth of the difference that
# two implementations may have; for other dtypes half a unit in the last place.
_ERROR = {"float32": 2.0**-19, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# How far the effect may exceed the estimate. SmolLM2-135M with a trained adapter: 1.4 times; random
# models with perturbed adapters: at most 3.
_SAFETY = 4.0


def choose_eps_z(model: Model, dtype: str) -> float:
    """The largest power of two in 2^-10..1 whose effect on a fused model's logits, estimated by
    `state_share` with a safety factor of 4, is below the rounding of the export's `dtype`; 1 for a
    model without a state.
    """
    share = state_share(model)
    fits = [eps for eps in CHOICES if _SAFETY * share * eps**2 / 2 <= _ERROR[dtype]]
    chosen = fits[0] if fits else CHOICES[-1]
    return max(chosen, FLOAT16_LEAST) if dtype == "float16" else chosen


def state_share(model: Model) -> float:
    """Estimate |z|^2 / |x|^2 in the residual stream of a fused model from its weights.

    The o and down kernel of each sublayer maps one input to the state z (columns forward and cross)
    and to the base channels x. For inputs without a preferred direction, the ratio of the energies
    is that of the squared Frobenius norms of the columns, and a sum of contributions has at most
    the largest share of a single one. The embedding adds to x only, so it makes the share smaller.
    Normed heads get the same estimate of their adapter dims, from the q and k kernels.
    """
    config, shares = model.config, [0.0]
    # kernel -> (channels of the base that it writes, axes of them)
    writes = {"o": (config.norm_dim, 1), "down": (config.norm_dim, 1)}
    if config.traits.qk_norm:
        writes |= {"q": (config.rotary_dim, 2), "k": (config.rotary_dim, 2)}
    for name, leaf in trees.flatten(model.params).items():
        module, parameter = name.split("/")[-2:]
        base, axes = writes.get(module, (leaf.shape[-1], 1))
        if parameter == "kernel" and base < leaf.shape[-1]:
            energy = _energy(leaf, tuple(range(name.startswith("layers/"), leaf.ndim - axes)))
            state, rest = jnp.sum(energy[..., base:], -1), jnp.sum(energy[..., :base], -1)
            shares.append(float(jnp.max(jnp.where(state > 0, state / rest, 0.0))))
    return max(shares)


def scales_state(config: LlamaConfig) -> bool:
    """Whether a model has a residual state or adapter dims of normed heads, which stock form stores
    times eps_z.
    """
    heads = config.traits.qk_norm and config.base_head_dim is not None
    return heads or config.base_hidden_size is not None


@partial(jax.jit, static_argnums=1)
def _energy(leaf: Any, axes: tuple[int, ...]) -> jax.Array:
    """The sum of squares over `axes`, float32; compiled, so no float32 copy of the leaf is made."""
    return jnp.sum(jnp.square(float_values(leaf).astype(jnp.float32)), axis=axes)


def check_eps_z(model: Model, eps_z: float) -> float:
    """Return a user's eps_z; ConfigError unless it is a power of two in 2^-10..1 and the model has
    a state.
    """
    require(
        eps_z in CHOICES,
        f"eps_z={eps_z!r}: must be a power of two from 2^-10 = {CHOICES[-1]} to 1, e.g. 0.0625."
        " Small values keep float logits exact, large ones (0.0625 and above) keep int8 consumers"
        " exact; leave it out to have it chosen from the weights.",
    )
    require(
        scales_state(model.config),
        f"eps_z={eps_z!r} scales the residual state of the zflora methods (and the adapter dims of"
        " heads that are normed), and this model has none; leave it out.",
    )
    return eps_z
