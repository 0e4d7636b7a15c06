"""From the native fused form to the stock form of Hugging Face's classes, and back.

A native fused model takes its RMSNorm over the base channels, rotates the base dims of a head and
divides scores by sqrt(k). Stock classes do all three over the full width. Stock form gets the same
function by changing weights and settings only:

- residual d+r: padded with zero channels to a width D that the heads divide; the adapter state
  stored times eps_z (see `state_scale`), so that it hardly counts in the mean square; norm gains
  times sqrt(d/D), rms_norm_eps times d/D.
- heads k+e: base dims moved to the places that RoPE pairs up, [0, k/2) and [(k+e)/2, (k+e)/2 +
  k/2), in q and k alike; q times sqrt((k+e)/k); the wanted frequencies written as `longrope`
  factors, 1e30 (no rotation) for adapter pairs.
- norms of heads (q_norm, k_norm): adapter dims of q and k stored times eps_z, their gains divided
  by it; gains of k times sqrt(k/(k+e)): the factors of q and of the scores cancel. There is one
  rms_norm_eps, the residual stream's; the error in the heads' is far below their sums of squares.

Letters: d residual width, k head dim, r and e the channels that an adapter adds, D padded width.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import QK_NORMS, count_base
from zflora_jax.core.families import require_format
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.keys import Place, Slices, as_finite, hf_shapes, hf_table, members
from zflora_jax.hf.rope import NO_ROTATION, longrope_powers
from zflora_jax.hf.state_scale import check_eps_z, choose_eps_z, scales_state
from zflora_jax.ops.quantized import float_values
from zflora_jax.ops.rope import paired_order, rope_frequencies

_READS = ("q", "k", "v", "gate", "up")
_WRITES = ("o", "down")
_NORMS = ("attn_norm", "mlp_norm", "final_norm")
_ROTATED = ("q", "k", "q_bias", "k_bias", *QK_NORMS)  # leaves with the order of heads' dims
TABLES = ("embed", "lm_head")  # as wide as the base; stock form pads them with zeros


@dataclass(frozen=True)
class StockForm:
    """The stock form of a native model.

    `module` in the methods is the result of `module_of`: "q", "embed", ...

    Attributes:
      native: Native config.
      eps_z: Scale of the stored residual state and of the adapter dims of normed heads, a power of
        two.
      multiple: Divisor of the stored hidden size. None: the number of heads, as transformers 5
        refuses a size that the heads do not divide.
      scores_in_rope: Whether the factor sqrt((k+e)/k) of scores is left out of q, because the file
        has its root among the RoPE settings, for q and k alike (GGUF).
    """

    native: LlamaConfig
    eps_z: float
    multiple: int | None = None
    scores_in_rope: bool = False

    @property
    def wider(self) -> float:
        """sqrt((k+e)/k), the factor that stock classes divide the scores by too much."""
        return math.sqrt(self.native.head_dim / self.native.rotary_dim)

    @functools.cached_property
    def width(self) -> int:
        """D, the stored hidden size. A residual stream that is not widened is left as it is."""
        n = self.native
        widened = n.base_hidden_size is not None
        return round_up(n.hidden_size, (self.multiple or n.num_heads) if widened else 1)

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """The config with stock widths and rms_norm_eps, and the base's RoPE settings; `rope` has
        the settings to write instead.
        """
        eps = self.native.rms_norm_eps * self.native.norm_dim / self.width
        return self.native.replace(
            hidden_size=self.width, rms_norm_eps=eps, base_hidden_size=None, base_head_dim=None
        )

    @property
    def rope(self) -> dict[str, Any] | None:
        """The rope_scaling that gives widened heads the frequencies of the base, else None."""
        if self.native.base_head_dim is None:
            return None
        factors = self.rope_divisors.tolist()
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.native.max_position_embeddings,
            "short_factor": factors,
            "long_factor": factors,
        }

    @property
    def rope_divisors(self) -> np.ndarray:
        """Divisors [(k+e)/2] float64 that make the inverse frequencies of a head of k+e dims the
        base's.
        """
        powers, wanted = longrope_powers(self.native), rope_frequencies(self.native)
        divisors = np.full(len(powers), NO_ROTATION)
        divisors[: len(wanted)] = 1 / (wanted.astype(np.float64) * powers[: len(wanted)])
        return divisors

    @property
    def head_order(self) -> np.ndarray:
        """[k+e]: the native head dim at each stock position, base halves first in each half."""
        return paired_order(self.native.rotary_dim, self.native.head_dim)

    def report(self, native: LlamaConfig) -> dict[str, Any]:
        """Parameters, widths, filled channels and eps_z of the stored form of a native config."""
        eps_z = {"eps_z": self.eps_z} if scales_state(native) else {}
        parameters = {"parameters": count_base(self.config)}
        return parameters | widths_report(native, self.config) | eps_z

    def restored(self, module: str) -> bool:
        """Whether stock form rounds a module, so that an export stores its native floats too."""
        n = self.native
        if module in _NORMS:
            return n.base_hidden_size is not None
        rounded = ("k_norm",) if n.traits.qk_norm else ("q", "q_bias")
        return module in rounded and n.base_head_dim is not None

    def forward(self, module: str, x: np.ndarray) -> np.ndarray:
        """Bring a native leaf of one layer, float32, into stock form."""
        if self.turned(module):
            x = (x * self.head_scale(module, self.eps_z))[..., self.head_order]
        axis = _residual_axis(module, x.ndim)
        if self.native.base_hidden_size is None or axis is None:
            return x
        padding = [(0, self.width - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return np.pad(x, padding) * self._scale(module, self.width, axis, x.ndim)

    def inverse(self, module: str, x: np.ndarray, at: Slices) -> np.ndarray:
        """The inverse of `forward` on a block of a leaf, float32, with all dims of heads, at slices
        `at` in the native leaf and in stock form (padding comes last); exact unless `restored`.
        """
        n, axis = self.native, _residual_axis(module, x.ndim)
        if n.base_hidden_size is not None and axis is not None:
            scale = self._scale(module, n.hidden_size, axis, x.ndim)
            x = x / np.take(scale, range(at[axis].start, at[axis].stop), axis)
        return self.inverse_heads(module, x)

    def turned(self, module: str) -> bool:
        """Whether a leaf has dims of widened heads, reordered and scaled for stock RoPE."""
        return self.native.base_head_dim is not None and module in _ROTATED

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
        elif module not in TABLES:
            scale[d:] = 1 / self.eps_z if module in _READS else self.eps_z
        return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


@dataclass(frozen=True)
class Stored:
    """The content of a Hugging Face directory, before it is written.

    Attributes:
      form: Stock form of the model.
      config: Content of config.json.
      specs: Name -> (shape, dtype) of every tensor.
      tensor: Name -> tensor. Processes that share the model's arrays call it together.
      report: Entries of the report.
      manifest: Entries of zflora.json that only some exports have.
    """

    form: StockForm
    config: Mapping[str, Any]
    specs: Mapping[str, tuple[tuple[int, ...], str]]
    tensor: Callable[[str], np.ndarray]
    report: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(default_factory=dict)


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
    """The stock form of a model that is not packed, with eps_z as given or chosen from the weights
    for the export's `dtype`; ConfigError if it is packed or eps_z cannot be used.
    """
    if model.config.execution.packed:
        raise ConfigError(
            "a packed model is a layout for decode and cannot be exported; export the model it was"
            " packed from."
        )
    chosen = choose_eps_z(model, dtype) if eps_z is None else check_eps_z(model, eps_z)
    return StockForm(model.config, chosen)


def round_up(width: int, multiple: int) -> int:
    """The smallest multiple that is no less than a width."""
    return -(-width // multiple) * multiple


def widths_report(native: LlamaConfig, stored: LlamaConfig) -> dict[str, str]:
    """The stored widths, and the streams filled with zeros up to them, for a report."""
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


def native_leaf(model: Model, place: Place) -> Any:
    """A native leaf of one layer on the host, as floats or codes. Processes that share the model's
    arrays call this together.
    """
    leaf = functools.reduce(operator.getitem, place.leaf.split("/"), model.params)
    return jax.tree.map(lambda part: trees.on_host(part, place.layer), leaf)


def native_tensor(model: Model, name: str) -> tuple[Place, np.ndarray]:
    """The place of a name of `hf_table`, and its native leaf of one layer in float32. Processes
    that share the model's arrays call this together.
    """
    place = hf_table(model.config)[name]
    values = float_values(native_leaf(model, place))
    return place, np.asarray(values).astype(np.float32, copy=False)


def to_stock(model: Model, dtype: str, eps_z: float | None = None) -> Stored:
    """A base or fused model in stock form; arguments and errors as for `stock_form`.

    Arithmetic is in float32 with one cast to `dtype` at the end; values that stock form does not
    change are copied bit for bit. Tensors raise CheckpointError if not finite in `dtype`.
    """
    require_format(model.config.family, "hf", model.config.base_head_dim is not None)
    form = stock_form(model, dtype, eps_z)
    table = hf_table(form.config)
    names, specs = members(table), {n: (shape, dtype) for n, shape in hf_shapes(table).items()}

    def rows(name: str) -> np.ndarray:
        place, x = native_tensor(model, name)
        array = table[name].to_hf(form.forward(module_of(place), x))
        return as_finite(array, np.dtype(dtype), name, "the model")

    def tensor(name: str) -> np.ndarray:
        first, *others = map(rows, names[name])
        return np.concatenate([first, *others]) if others else first

    config = to_hf_config(form.config, dtype, form.rope)
    return Stored(form, config, specs, tensor, form.report(model.config))
