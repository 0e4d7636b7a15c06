"""Names of the activations that the backward pass of a layer keeps."""

from __future__ import annotations

from typing import Any

import jax

# The streams (`checkpoint_name`) that are kept; norms, gates and softmax are computed again. A LoRA
# step of SmolLM2-135M then takes two thirds of the memory.
SAVED_NAMES = ("residual", "heads", "mlp", "low rank")
_named = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
# Of gathered kernels: kept for all layers, these would be a copy of the model.
_COPIES = "custom_vjp_call", "sharding_constraint", "reshape", "convert_element_type", "transpose"
# By the name in the settings; None keeps only the input of a block.
POLICIES: dict[str, Any] = {
    "none": lambda primitive, *_, **__: primitive.name not in _COPIES,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _named,  # and the results of cuDNN's attention, which have no name
        lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),
    ),
    "block": None,
}
