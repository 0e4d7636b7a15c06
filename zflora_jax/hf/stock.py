"""From the native fused form to the stock form of Hugging Face's classes, and back.

A native fused model takes its RMSNorm over the base channels, rotates the base dims of a head and
divides scores by sqrt(k). Stock classes do all three over the full width. Stock form gets the same
function by changing numbers only:

- residual d+r: padded with zero channels to a width D that the heads divide; the adapter state
  stored times eps_z (see `state_scale`), so that it hardly counts in the mean square; norm gains
  times sqrt(d/D), rms_norm_eps times d/D.
- heads k+e: base dims moved to the places that RoPE pairs up, [0, k/2) and [(k+e)/2, (k+e)/2 +
  k/2), in q and k alike; q times sqrt((k+e)/k); the wanted frequencies written as `longrope`
  factors, 1e30 (no rotation) for adapter pairs.
- norms of heads (q_norm, k_norm): adapter dims of q and k stored times eps_z, their gains divided
  by it; gains of k times sqrt(k/(k+e)), which for those of q and the scale of scores cancel. There
  is one rms_norm_eps, the residual stream's; that of heads is off by less than itself, in sums of
  squares that it is far below.

Letters: d residual width, k head dim, r and e what an adapter adds to them, D padded width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import QK_NORMS
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.keys import Place, Slices, as_finite, hf_table
from zflora_jax.hf.rope import NO_ROTATION, longrope_powers
from zflora_jax.hf.state_scale import check_eps_z, choose_eps_z
from zflora_jax.ops.quantized import float_values
from zflora_jax.ops.rope import paired_order, rope_frequencies

_READS, _WRITES, _NORMS = (
    ("q", "k", "v", "gate", "up"),
    ("o", "down"),
    ("attn_norm", "mlp_norm", "final_norm"),
)
_TURNED = ("q", "k", "q_bias", "k_bias", *QK_NORMS)  # what has the order of heads' dims
TABLES = ("embed", "lm_head")  # as wide as the base; stock form pads them with zeros


@dataclass(frozen=True)
class StockForm:
    """The stock form of a native model.

    `module` in the methods is that of `module_of`: "q", "embed", ...

    Attributes:
      native: the native config.
      eps_z: scale of the stored residual state and of the adapter dims of normed heads, a power of
        two.
      multiple: the stored hidden size is a multiple of it. None: of the number of heads, as
        transformers 5 refuses one that the heads do not divide.
      scores_in_rope: the factor sqrt((k+e)/k) of scores is left out of q, because the file has its
        root beside the RoPE settings, for q and k alike (GGUF).
    """

    native: LlamaConfig
    eps_z: float
    multiple: int | None = None
    scores_in_rope: bool = False

    @property
    def wider(self) -> float:
        """sqrt((k+e)/k), by which stock classes divide the scores too much."""
        return math.sqrt(self.native.head_dim / self.native.rotary_dim)

    @property
    def width(self) -> int:
        """D, the stored hidden size. A residual stream that is not widened is left alone."""
        n, multiple = self.native, self.multiple or self.native.num_heads
        return (
            n.hidden_size
            if n.base_hidden_size is None
            else -(-n.hidden_size // multiple) * multiple
        )

    @property
    def config(self) -> LlamaConfig:
        """The config with stock widths and rms_norm_eps. Its RoPE settings are the base's; `rope`
        has those to write instead.
        """
        eps = self.native.rms_norm_eps * self.native.norm_dim / self.width
        return self.native.replace(
            hidden_size=self.width, rms_norm_eps=eps, base_hidden_size=None, base_head_dim=None
        )

    @property
    def rope(self) -> dict[str, Any] | None:
        """The rope_scaling that gives widened heads the frequencies of the base, else None."""
        n = self.native
        if n.base_head_dim is None:
            return None
        factors = self.rope_divisors.tolist()
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": n.max_position_embeddings,
            "short_factor": factors,
            "long_factor": factors,
        }

    @property
    def rope_divisors(self) -> np.ndarray:
        """[(k+e)/2] float64: what divides the plain inverse frequencies of a head of k+e dims, so
        that they are those of the base.
        """
        powers, wanted = longrope_powers(self.native), rope_frequencies(self.native)
        divisors = np.full(len(powers), NO_ROTATION)
        divisors[: len(wanted)] = 1 / (wanted.astype(np.float64) * powers[: len(wanted)])
        return divisors

    @property
    def head_order(self) -> np.ndarray:
        """[k+e]: the native head dim at each stock position, base halves first in each half."""
        return paired_order(self.native.rotary_dim, self.native.head_dim)

    def restored(self, module: str) -> bool:
        """Whether stock form rounds this module's numbers, so that the native ones are stored
        beside the export.
        """
        rounded = ("k_norm",) if self.native.traits.qk_norm else ("q", "q_bias")
        return (module in _NORMS and self.native.base_hidden_size is not None) or (
            module in rounded and self.native.base_head_dim is not None
        )

    def forward(self, module: str, x: np.ndarray) -> np.ndarray:
        """Bring a native leaf of one layer into stock form.

        Args:
          module: its name by `module_of`.
          x: float32, in native layout.
        """
        n = self.native
        if n.base_head_dim is not None and module in _TURNED:
            x = (x * self.head_scale(module, self.eps_z))[..., self.head_order]
        if n.base_hidden_size is None or (axis := _residual_axis(module, x.ndim)) is None:
            return x
        padding = [(0, self.width - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return np.pad(x, padding) * self._scale(module, self.width, axis, x.ndim)

    def inverse(self, module: str, x: np.ndarray, at: Slices) -> np.ndarray:
        """The inverse of `forward` on a block of a leaf; exact except where `restored` is true.

        Args:
          module: its name by `module_of`.
          x: the block, float32; of heads it holds all dims.
          at: its slices, in the native leaf and in stock form alike: padding comes last.
        """
        n = self.native
        if n.base_hidden_size is not None and (axis := _residual_axis(module, x.ndim)) is not None:
            scale = self._scale(module, n.hidden_size, axis, x.ndim)
            x = x / np.take(scale, range(at[axis].start, at[axis].stop), axis)
        return self.inverse_heads(module, x)

    def turned(self, module: str) -> bool:
        """Whether a leaf has dims of widened heads, reordered and scaled for stock RoPE."""
        return self.native.base_head_dim is not None and module in _TURNED

    def inverse_heads(self, module: str, x: np.ndarray, *, state: bool = True) -> np.ndarray:
        """The part of `inverse` that concerns heads. state: whether eps_z is undone."""
        if not self.turned(module):
            return x
        scale = self.head_scale(module, self.eps_z if state else 1.0)
        return x[..., np.argsort(self.head_order)] / scale

    def head_scale(self, module: str, eps_z: float) -> np.ndarray:
        """The factors of a head's dims, [k+e] float32, in native order."""
        n = self.native
        scale, wider = np.ones(n.head_dim, np.float32), 1.0 if self.scores_in_rope else self.wider
        if not n.traits.qk_norm:
            return scale * np.float32(wider if module.startswith("q") else 1)
        scale[n.rotary_dim :] = 1 / eps_z if module in QK_NORMS else eps_z
        return scale / np.float32(wider if module == "k_norm" else 1)

    def _scale(self, module: str, width: int, axis: int, ndim: int) -> np.ndarray:
        """The factors of a leaf's residual channels, shaped to broadcast along `axis`."""
        scale, d = np.ones(width, np.float32), self.native.norm_dim
        if module in _NORMS:
            scale[:] = math.sqrt(d / self.width)
        elif module in _READS:
            scale[d:] = 1 / self.eps_z
        elif module in _WRITES:
            scale[d:] = self.eps_z
        return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _residual_axis(module: str, ndim: int) -> int | None:
    """The axis of a native leaf (one layer) that runs over the residual stream."""
    if module in _READS or module in _NORMS or module == "lm_head":
        return 0
    return ndim - 1 if module in _WRITES or module == "embed" else None


def module_of(place: Place) -> str:
    """The parent of a leaf in the native tree: "q", "embed", ...; of a bias "q_bias"."""
    module, parameter = place.leaf.split("/")[-2:]
    return f"{module}_bias" if parameter == "bias" else module


def stock_form(model: Model, dtype: str, eps_z: float | None = None) -> StockForm:
    """The stock form of a model.

    Args:
      model: a base or fused model, not packed.
      dtype: of the export.
      eps_z: None: chosen from the weights for `dtype`.

    Raises:
      ConfigError: the model is packed, or eps_z cannot be used.
    """
    if model.config.execution.packed:
        raise ConfigError(
            "a packed model is a layout for decode and cannot be exported; export the model it was"
            " packed from."
        )
    return StockForm(
        model.config, choose_eps_z(model, dtype) if eps_z is None else check_eps_z(model, eps_z)
    )


def round_up(width: int, multiple: int) -> int:
    """The smallest multiple that is no less than a width."""
    return -(-width // multiple) * multiple


def widths_report(native: LlamaConfig, stored: LlamaConfig) -> dict[str, str]:
    """What a report says of the stored widths, and of what was filled with zeros up to them."""
    widths = {
        "hidden": (native.hidden_size, stored.hidden_size),
        "head": (native.head_dim, stored.head_dim),
        "MLP": (native.intermediate_size, stored.intermediate_size),
    }
    filled = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in widths.items() if a != b)
    return {
        "widths": f"hidden {stored.hidden_size}, heads {stored.num_heads} x {stored.head_dim},"
        f" MLP {stored.intermediate_size}",
        "filled with zeros": filled or "nothing",
    }


def native_tensor(model: Model, name: str) -> tuple[Place, np.ndarray]:
    """The place of a Hugging Face tensor, and its native leaf of one layer in float32. Processes
    that share the model's arrays call this together.
    """
    place = hf_table(model.config)[name]
    values = float_values(native_leaf(model, place))
    return place, np.asarray(values).astype(np.float32, copy=False)


def native_leaf(model: Model, place: Place) -> Any:
    """A native leaf of one layer on the host, as numbers or codes. Processes that share the model's
    arrays call this together.
    """
    leaf = trees.flatten(model.params)[place.leaf]
    return jax.tree.map(lambda part: trees.on_host(part, place.layer), leaf)


def to_stock(
    model: Model, form: StockForm, dtype: str
) -> tuple[dict[str, Any], Callable[[str], np.ndarray]]:
    """Bring a model into stock form.

    Arithmetic is in float32 with one cast at the end; numbers that stock form does not change are
    copied bit for bit.

    Args:
      model: a base or fused model.
      form: of `stock_form`.
      dtype: of the tensors.

    Returns:
      (config.json as a dict, a function from a Hugging Face name to the tensor). The function
      raises CheckpointError for a tensor that is not finite in `dtype`.
    """
    table = hf_table(form.config)

    def tensor(name: str) -> np.ndarray:
        place, x = native_tensor(model, name)
        array = table[name].to_hf(form.forward(module_of(place), x))
        return as_finite(array, np.dtype(dtype), name, "the model")

    return to_hf_config(form.config, dtype, form.rope), tensor
