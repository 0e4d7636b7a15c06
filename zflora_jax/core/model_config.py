"""The shape of a model, and its execution settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from zflora_jax.core.families import FAMILIES, Family
from zflora_jax.core.fields import Count, Natural, Positive, check_types, require, require_in

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["default", "high", "highest"]  # of float32 products: ops.precision
Remat = Literal["none", "dots", "block"]  # what the backward pass keeps: ops.remat


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`): low frequencies are divided by `factor`, a
    band between is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: Count

    def __post_init__(self) -> None:
        check_types(self)
        require(self.factor >= 1, f"rope_scaling.factor={self.factor}: must be at least 1.")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            "rope_scaling: need high_freq_factor > low_freq_factor > 0, got"
            f" {self.high_freq_factor} and {self.low_freq_factor}.",
        )


@dataclass(frozen=True)
class Execution:
    """Execution settings, which do not change the model.

    Attributes:
      dtype: Data type of activations; kernels are cast to it where they are used.
      scan_layers: One stacked block run by lax.scan (fast to compile), or one subtree per layer
        (fast to decode).
      packed: Whether kernels have the layout for decode (`adapters.packing.pack_for_decode`).
      fill_residual, fill_mlp: Number of zero channels that pad a stream in packed kernels.
      remat: Values that the backward pass keeps of a block, see `ops.remat.POLICIES`.
      matmul_precision: Precision of float32 products, as TrainConfig's.
      joint_head_norms: Whether norms of heads average over all dims, as stock classes do; it serves
        to measure the effect of that (`hf.restore.load_stock`).
    """

    dtype: Dtype = "float32"
    scan_layers: bool = True
    packed: bool = False
    fill_residual: Natural = 0
    fill_mlp: Natural = 0
    remat: Remat = "dots"
    matmul_precision: Precision = "default"
    joint_head_norms: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and execution settings of a model of any of `core.families.FAMILIES`. A fused model has
    the same class with wider streams.

    Attention sees the last `sliding_window` positions, including the token's own; the layers in
    `nope_layers` have no RoPE. `base_hidden_size` and `base_head_dim` count the leading channels
    of the residual stream and of a head that belong to the base (None: all). RMSNorm averages over
    the former, RoPE rotates the latter, and attention divides by sqrt(base_head_dim).

    `replace` takes the fields of `execution` too: config.replace(scan_layers=False).
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    base_hidden_size: Count | None = None
    base_head_dim: Count | None = None
    family: str = "llama"
    sliding_window: Count | None = None
    nope_layers: tuple[int, ...] = ()
    execution: Execution = Execution()

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads};"
            " grouped-query attention needs whole groups.",
        )
        require(
            self.base_head_width % 2 == 0,
            f"base_head_dim={self.base_head_width}: must be even, because RoPE rotates pairs.",
        )
        for name in ("head_dim", "hidden_size"):
            base, wide = getattr(self, f"base_{name}") or 0, getattr(self, name)
            require(base <= wide, f"base_{name}={base} exceeds {name}={wide}.")
        self._check_family()

    def _check_family(self) -> None:
        name, window, layers = self.family, self.sliding_window, self.nope_layers
        require_in(FAMILIES, name, f"family={name!r}")
        require(
            window is None or self.traits.window,
            f"sliding_window={window}: must be None, except in a family that has windows"
            f" ({', '.join(n for n in FAMILIES if FAMILIES[n].window)}).",
        )
        require(
            not layers or (self.traits.nope and 0 <= min(layers) <= max(layers) < self.num_layers),
            f"nope_layers={layers}: must be below num_layers={self.num_layers}, in a family with"
            f" layers without RoPE ({', '.join(n for n in FAMILIES if FAMILIES[n].nope)}).",
        )

    @property
    def traits(self) -> Family:
        """Traits of its family."""
        return FAMILIES[self.family]

    @property
    def base_width(self) -> int:
        """Residual channels of the base model, d."""
        return self.base_hidden_size or self.hidden_size

    @property
    def base_head_width(self) -> int:
        """Head dims of the base model, k."""
        return self.base_head_dim or self.head_dim

    @property
    def widened(self) -> bool:
        """True if the residual stream or the heads are wider than a base's."""
        return self.base_hidden_size is not None or self.base_head_dim is not None

    @property
    def stored(self) -> LlamaConfig:
        """The config with the stored widths of kernels, zero channels included."""
        d, f = self.execution.fill_residual, self.execution.fill_mlp
        if d == f == 0:
            return self
        return self.replace(
            hidden_size=self.hidden_size + d,
            intermediate_size=self.intermediate_size + f,
            base_hidden_size=self.base_width if d else self.base_hidden_size,
            fill_residual=0,
            fill_mlp=0,
        )

    def replace(self, **changes: Any) -> LlamaConfig:
        """Returns a copy with other values of fields, those of `execution` included."""
        how = {f.name for f in dataclasses.fields(Execution)} & changes.keys()
        if how:
            run = changes.get("execution", self.execution)
            changes["execution"] = dataclasses.replace(run, **{k: changes.pop(k) for k in how})
        if "num_layers" in changes and "nope_layers" not in changes:
            kept = (i for i in self.nope_layers if i < changes["num_layers"])
            changes["nope_layers"] = tuple(kept)
        return dataclasses.replace(self, **changes)
