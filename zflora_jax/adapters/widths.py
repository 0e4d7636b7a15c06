"""Widths that suit a type of device: packed models are padded to them, adapters rounded."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from zflora_jax.adapters.methods import fused_config, resolve_adapter
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import nearest, require
from zflora_jax.core.model_config import LlamaConfig


@dataclass(frozen=True)
class Multiples:
    """The multiples that the widths of the streams should be of."""

    residual: int
    mlp: int


# cpu: the float32 of a 256-bit vector; XLA goes through the rest number by number.
# gpu: in every token XLA's GPU compiler copies a kernel whose inputs it cannot divide into 16 sums,
# and has two more kernels a layer for other residual widths, from 8 rows on. tpu: tiles have 128
# columns, filled or not (both: by the compilers, benchmarks/accelerators.py).
MULTIPLES = {"cpu": Multiples(8, 8), "gpu": Multiples(32, 128), "tpu": Multiples(128, 128)}


def multiples(kind: str) -> Multiples:
    """The row of `MULTIPLES` for a type of device; ConfigError for an unknown one."""
    require(kind in MULTIPLES, f"device kind {kind!r}: {nearest(kind, MULTIPLES)}.")
    return MULTIPLES[kind]


def this_kind() -> str:
    """The type of this process's devices; "cpu" for one that `MULTIPLES` does not have."""
    backend = jax.default_backend()
    return backend if backend in MULTIPLES else "cpu"


def round_widths(config: LlamaConfig, adapter: AdapterConfig, kind: str) -> AdapterConfig:
    """Rounds an adapter's fused widths up to those that suit a type of device.

    The scale alpha / rank stays. Heads stay too: their sizes are those that attention kernels know.

    Args:
      config: Config of the base.
      adapter: Adapter of any method; one that does not widen is returned as it is.
      kind: Type of device, "cpu", "gpu" or "tpu".

    Returns:
      The adapter with another rank and extra_mlp_units.

    Raises:
      ConfigError: unknown type of device.
    """
    wanted = multiples(kind)
    if not METHODS[adapter.method].widens:
        return adapter
    widths, wide = resolve_adapter(config, adapter), fused_config(config, adapter)
    residual = -wide.hidden_size % wanted.residual if widths.residual else 0
    mlp = -wide.intermediate_size % wanted.mlp if widths.mlp else 0
    if residual == mlp == 0:
        return adapter
    if widths.mlp:  # explicit: unset, it would follow the rank
        adapter = adapter.replace(extra_mlp_units=widths.mlp + mlp)
    if not residual:
        return adapter
    wider = adapter.replace(rank=widths.residual + residual)
    return wider.replace(alpha=adapter.scale * wider.divisor)


def width_advice(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, str]:
    """Type of device -> a sentence with better widths for it, where padding could be trained."""
    found, wide = {}, fused_config(config, adapter)
    for kind in MULTIPLES:
        better = round_widths(config, adapter, kind)
        if better == adapter:
            continue
        filled = fused_config(config, better)
        changes = [
            f"adapter.{name}={getattr(better, name):g}"
            for name in ("rank", "alpha", "extra_mlp_units")
            if getattr(better, name) != getattr(adapter, name)
        ]
        found[kind] = (
            f"decode reads hidden {wide.hidden_size} as {filled.hidden_size} and MLP"
            f" {wide.intermediate_size} as {filled.intermediate_size}, filled up with zeros;"
            f" {' '.join(changes)} trains those channels at the same speed"
        )
    return found
