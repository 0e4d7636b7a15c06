"""Settings that a run, a record or an export wrote down."""

from __future__ import annotations

from typing import Any

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import T, from_dict
from zflora_jax.core.run_config import RunConfig


def from_file(cls: type[T], values: dict[str, Any], name: str = "") -> T:
    """`from_dict` of what a run, a record or an export wrote down; a setting that is younger than
    the file is what it was when the file was written.

    LoRA's A was normal until `AdapterConfig.init` could say otherwise.

    Args:
      cls: RunConfig or AdapterConfig.
      values: its fields as JSON has them.
      name: for messages.

    Raises:
      ConfigError: unknown keys, wrong types.
    """

    def adapter(values: Any) -> Any:
        old = isinstance(values, dict) and values.get("method") == "lora" and "init" not in values
        return values | {"init": "normal"} if old else values

    if cls is AdapterConfig:
        values = adapter(values)
    elif cls is RunConfig and isinstance(values, dict) and "adapter" in values:
        values = values | {"adapter": adapter(values["adapter"])}
    return from_dict(cls, values, name)
