"""What the backward pass of a layer saves, by name."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

from zflora_jax.ops.linear import Array

# What the backward pass of a layer keeps, by name; the rest (norms, gates, softmax) it computes
# again from these, which costs little: for a LoRA step of SmolLM2-135M two thirds of the memory
# that keeping all takes. The names are the streams whose values are kept.
SAVED_NAMES = ("residual", "heads", "mlp", "low rank")


# cuDNN's attention gives what its backward pass needs without a name: that kernel's results are
# kept too.
REMAT_POLICY = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),
)


def save_for_backward(x: Array, name: str) -> Array:
    """`x`, kept for the backward pass. name: one of SAVED_NAMES."""
    return checkpoint_name(x, name)
