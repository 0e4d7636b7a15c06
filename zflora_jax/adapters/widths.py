"""Sizes of an adapter: its parameters, and widths that suit a device."""

from __future__ import annotations

import math

import jax

from zflora_jax.adapters.methods import fused_config, live_layers, resolve_adapter
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import require_in
from zflora_jax.core.model_config import LlamaConfig

# Type of device -> what the widths of the residual and the MLP stream should be multiples of. cpu:
# 256-bit vectors. gpu: XLA copies others in every token. tpu: tiles of 128 columns.
MULTIPLES = {"cpu": (8, 8), "gpu": (32, 128), "tpu": (128, 128)}


def multiples(kind: str) -> tuple[int, int]:
    """The multiples of a type of device; ConfigError for an unknown one."""
    require_in(MULTIPLES, kind, f"device type {kind!r}")
    return MULTIPLES[kind]


def this_kind() -> str:
    """The type of this process's devices; "cpu" for one that `MULTIPLES` does not have."""
    backend = jax.default_backend()
    return backend if backend in MULTIPLES else "cpu"


def round_widths(config: LlamaConfig, adapter: AdapterConfig, kind: str) -> AdapterConfig:
    """Rounds an adapter's fused widths up to those that suit a type of device.

    The scale and the heads stay: head sizes are those that attention kernels know.

    Args:
      config: Config of the base.
      adapter: Adapter of any method; one that does not widen is returned as it is.
      kind: "cpu", "gpu" or "tpu".

    Returns:
      The adapter with other widths.

    Raises:
      ConfigError: unknown type of device.
    """
    of_residual, of_mlp = multiples(kind)
    if not METHODS[adapter.method].widens:
        return adapter
    widths, wide = resolve_adapter(config, adapter), fused_config(config, adapter)
    residual = -wide.hidden_size % of_residual if widths.residual else 0
    mlp = -wide.intermediate_size % of_mlp if widths.mlp else 0
    if widths.mlp and (residual or mlp):  # unset, it may follow the rank
        adapter = adapter.replace(extra_mlp_units=widths.mlp + mlp)
    if not residual:
        return adapter
    wider = adapter.replace(rank=widths.residual + residual)
    return wider.replace(alpha=adapter.scale * wider.divisor_of(wider.rank))


def width_advice(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, str]:
    """Type of device -> what a fused token reads, and widths that train the padding."""
    found = dict[str, str]()
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    for kind in MULTIPLES if METHODS[adapter.method].widens else ():
        better = round_widths(config, adapter, kind)
        read, base = (count_base(c) - embedding for c in (fused_config(config, better), config))
        changes = " ".join(
            f"adapter.{name}={getattr(better, name):g}"
            for name in ("rank", "alpha", "extra_mlp_units")
            if getattr(better, name) != getattr(adapter, name)
        )
        found[kind] = f"a fused token reads {read / base:.3f} times a float base's weights"
        found[kind] += f"; {changes} trains its padding" * bool(changes)
    return found


def count_params(config: LlamaConfig, adapter: AdapterConfig) -> int:
    """Counts the trainable parameters of an adapter, without those of dead layers (`live_layers`).

    Args:
      config: Config of the base.
      adapter: Adapter of any method.
    """
    if METHODS[adapter.method].in_place == "full":
        return count_base(config)
    live = live_layers(config, adapter)
    return sum(
        len(live[kernel][block]) * math.prod(shape)
        for kernel, blocks in resolve_adapter(config, adapter).blocks.items()
        for block, shape in blocks.items()
    )
