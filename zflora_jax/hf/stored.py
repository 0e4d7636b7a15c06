"""What a Hugging Face directory holds, before it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from zflora_jax.hf.stock import StockForm


@dataclass(frozen=True)
class Stored:
    """What a directory holds, before it is written.

    Attributes:
      form: the stock form of the model.
      config: config.json.
      specs: name -> (shape, dtype) of every tensor.
      tensor: name -> the tensor. Processes that share the model's arrays call it together.
      report: what the report says of it.
      manifest: what zflora.json says beside what it says of every export.
    """

    form: StockForm
    config: Mapping[str, Any]
    specs: Mapping[str, tuple[tuple[int, ...], str]]
    tensor: Callable[[str], np.ndarray]
    report: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
