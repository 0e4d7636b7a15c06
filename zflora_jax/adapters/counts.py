"""How many parameters an adapter trains, and the rank that a budget allows."""

from __future__ import annotations

import math

from zflora_jax.adapters.methods import live_layers, resolve_adapter
from zflora_jax.adapters.shapes import block_shapes
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig


def count_params(config: LlamaConfig, adapter: AdapterConfig) -> int:
    """Count the trainable parameters of an adapter, without those of dead layers (see
    `live_layers`).

    Args:
      config: Config of the base.
      adapter: Adapter of any method.
    """
    if METHODS[adapter.method].in_place == "full":
        return count_base(config)
    live = live_layers(config, adapter)
    shapes = block_shapes(config, adapter)
    return sum(
        len(layers) * math.prod(shapes[kernel][block])
        for kernel, names in live.items()
        for block, layers in names.items()
    )


def rank_for_budget(config: LlamaConfig, adapter: AdapterConfig, budget: int) -> AdapterConfig:
    """Choose the rank whose parameter count is nearest to a budget.

    Ranks that keep hidden_size + r and intermediate_size + m multiples of 8 (better 16), and
    hidden_size + r a multiple of the heads, run and export best; the result is not rounded to them.

    Args:
      config: Config of the base.
      adapter: The other settings; alpha / rank is kept (with use_rslora alpha), and a width that is
        None follows the rank.
      budget: Trainable parameters.

    Returns:
      `adapter` with that rank.

    Raises:
      ConfigError: the method has no rank, or none comes within a factor of 1.5 of the budget.
    """
    require(budget >= 1, f"budget={budget}: must be at least 1 parameter.")
    require(
        METHODS[adapter.method].in_place != "full",
        "method 'full' has no rank: it trains every base parameter.",
    )
    require(
        not adapter.rank_pattern and not adapter.alpha_pattern,
        "a budget sets one rank for all kernels: leave adapter.rank_pattern and alpha_pattern out.",
    )

    def at(rank: int) -> AdapterConfig:
        kept = adapter.alpha is None or adapter.use_rslora
        return adapter.replace(rank=rank, alpha=adapter.alpha if kept else adapter.scale * rank)

    low, high = 1, 2
    require(
        count_params(config, at(low)) != count_params(config, at(high)),
        f"method {adapter.method!r} has no rank here: no width depends on it; set extra_head_dim"
        " or extra_mlp_units to the width you want, or leave extra_mlp_units unset.",
    )
    while count_params(config, at(high)) < budget and high < config.hidden_size * 64:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_params(config, at(middle)) < budget else (low, middle)
    best = min((at(low), at(high)), key=lambda a: abs(count_params(config, a) - budget))
    found = count_params(config, best)
    bound = "needs at least" if found > budget else "reaches no more than"
    require(
        budget / 1.5 <= found <= 1.5 * budget,
        f"method {adapter.method!r} {bound} {found:,} parameters here, whatever its rank; a budget"
        f" of {budget:,} cannot be met. Change extra_mlp_units, extra_head_dim or targets.",
    )
    resolve_adapter(config, best)
    return best
