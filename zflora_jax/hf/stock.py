"""From the native fused form to the stock form of Hugging Face's classes, and back.

A native fused model takes its RMSNorm over the base channels, rotates the base dims of a head and
divides scores by sqrt(k). Stock classes do all three over the full width. Stock form gets the same
function by changing weights and settings only:

- residual d+r: padded with zero channels to a width D that the heads divide; the adapter state
  stored times eps_z (see `choose_eps_z`), so that it hardly counts in the mean square; norm gains
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
import jax.numpy as jnp
import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import QK_NORMS, count_base
from zflora_jax.core.families import require_format
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.keys import Place, as_finite, hf_shapes, hf_table, members
from zflora_jax.ops.rope import paired_order, rope_frequencies

_READS = ("q", "k", "v", "gate", "up")
_WRITES = ("o", "down")
_NORMS = ("attn_norm", "mlp_norm", "final_norm")
_ROTATED = ("q", "k", "q_bias", "k_bias", *QK_NORMS)  # leaves with the order of heads' dims
TABLES = ("embed", "lm_head")  # as wide as the base; stock form pads them with zeros

CHOICES = tuple(2.0**-k for k in range(11))  # 1, 1/2, ... 2^-10
# Rows that read the state are divided by eps_z; below this they leave the range of float16.
FLOAT16_LEAST = 2.0**-4

# The relative error of the logits that eps_z may cause: for float32, the rounding error of a whole
# model's logits (SmolLM2-135M: 1.8e-6 of the largest); else half a unit in the last place.
_ERROR = {"float32": 2.0**-19, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# The effect may exceed the estimate: 1.4 times in SmolLM2-135M, up to 3 in random models.
_SAFETY = 4.0

# Divides an inverse frequency to zero and stays finite in float32 when multiplied by any theta
NO_ROTATION = 1e30


@dataclass(frozen=True)
class StockForm:
    """The stock form of a native model.

    `module` in the methods is the result of `module_of`: "q", "embed", ...
    """

    native: LlamaConfig
    eps_z: float  # scale of the stored state and of the adapter dims of normed heads
    # Divisor of the stored hidden size; None: the number of heads, which transformers 5 requires.
    multiple: int | None = None
    # The factor sqrt((k+e)/k) of scores is left out of q: a GGUF file has its root among the RoPE
    # settings, for q and k alike.
    scores_in_rope: bool = False

    @property
    def wider(self) -> float:
        """sqrt((k+e)/k), the factor that stock classes divide the scores by too much."""
        return math.sqrt(self.native.head_dim / self.native.base_head_width)

    @functools.cached_property
    def width(self) -> int:
        """D, the stored hidden size; of a residual stream that is not widened its own."""
        n = self.native
        widened = n.base_hidden_size is not None
        return round_up(n.hidden_size, (self.multiple or n.num_heads) if widened else 1)

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """The config with stock widths and rms_norm_eps, and the base's RoPE settings."""
        eps = self.native.rms_norm_eps * self.native.base_width / self.width
        return self.native.replace(
            hidden_size=self.width, rms_norm_eps=eps, base_hidden_size=None, base_head_dim=None
        )

    @property
    def rope(self) -> dict[str, Any] | None:
        """The rope_scaling that gives widened heads the frequencies of the base, else None."""
        if self.native.base_head_dim is None:
            return None
        factors, length = self.rope_divisors.tolist(), self.native.max_position_embeddings
        rope = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        rope |= {"original_max_position_embeddings": length}
        return rope | {"short_factor": factors, "long_factor": factors}

    @property
    def rope_divisors(self) -> np.ndarray:
        """Divisors [(k+e)/2] float64 that make the inverse frequencies of a head the base's."""
        n, wanted = self.native, rope_frequencies(self.native).astype(np.float64)
        exponents = np.arange(0, n.head_dim, 2, dtype=np.float32) / np.float32(n.head_dim)
        powers = (np.float32(n.rope_theta) ** exponents).astype(np.float64)  # as transformers does
        divisors = np.full(len(powers), NO_ROTATION)
        divisors[: len(wanted)] = 1 / (wanted * powers[: len(wanted)])
        return divisors

    @property
    def head_order(self) -> np.ndarray:
        """[k+e]: the native head dim at each stock position, base halves first in each half."""
        return paired_order(self.native.base_head_width, self.native.head_dim)

    def restored(self, module: str) -> bool:
        """Whether stock form rounds a module, so that an export stores its native floats too."""
        n = self.native
        if module in _NORMS:
            return n.base_hidden_size is not None
        rounded = ("k_norm",) if n.traits.qk_norm else ("q", "q_bias")
        return module in rounded and n.base_head_dim is not None

    def tensor(self, model: Model, name: str) -> np.ndarray:
        """The rows of a name of `hf_table` in stock form, float32, with zeros up to the widths of
        this form. Processes call this together.
        """
        place, x = native_tensor(model, name)
        wanted = hf_table(self.native)[name].shape
        x = np.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted, strict=True)])
        return hf_table(self.config)[name].to_hf(self.convert(module_of(place), x))

    def convert(self, module: str, x: np.ndarray) -> np.ndarray:
        """Brings a native leaf of one layer, float32, into stock form."""
        if self.rotated(module):
            x = (x * self.head_scale(module, self.eps_z))[..., self.head_order]
        axis = self._residual_axis(module, x.ndim)
        if axis is None:
            return x
        x = np.moveaxis(x, axis, -1)
        x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.width - x.shape[-1])])
        return np.moveaxis(x * self._scale(module, self.width), -1, axis)

    def inverse(self, module: str, x: np.ndarray) -> np.ndarray:
        """The inverse of `convert`, of a leaf without its padding; exact unless `restored`."""
        axis = self._residual_axis(module, x.ndim)
        if axis is not None:
            scale = self._scale(module, x.shape[axis])
            x = np.moveaxis(np.moveaxis(x, axis, -1) / scale, -1, axis)
        return self.inverse_heads(module, x)

    def rotated(self, module: str) -> bool:
        """Whether a leaf has dims of widened heads, reordered and scaled for stock RoPE."""
        return self.native.base_head_dim is not None and module in _ROTATED

    def inverse_heads(self, module: str, x: np.ndarray, *, state: bool = True) -> np.ndarray:
        """The part of `inverse` that concerns heads. state: Whether eps_z is undone."""
        if not self.rotated(module):
            return x
        scale = self.head_scale(module, self.eps_z if state else 1.0)
        return x[..., np.argsort(self.head_order)] / scale

    def head_scale(self, module: str, eps_z: float) -> np.ndarray:
        """Factors of a head's dims, [k+e] float32, in native order."""
        n = self.native
        scale, wider = np.ones(n.head_dim, np.float32), 1.0 if self.scores_in_rope else self.wider
        if not n.traits.qk_norm:
            return scale * np.float32(wider if module.startswith("q") else 1)
        scale[n.base_head_width :] = 1 / eps_z if module in QK_NORMS else eps_z
        return scale / np.float32(wider if module == "k_norm" else 1)

    def _residual_axis(self, module: str, ndim: int) -> int | None:
        """The axis of a native leaf (one layer) that runs over a widened residual stream."""
        if self.native.base_hidden_size is None:
            return None
        if module in _READS or module in _NORMS or module == "lm_head":
            return 0
        return ndim - 1 if module in _WRITES or module == "embed" else None

    def _scale(self, module: str, width: int) -> np.ndarray:
        """The factors of a leaf's residual channels."""
        scale, d = np.ones(width, np.float32), self.native.base_width
        if module in _NORMS:
            scale[:] = math.sqrt(d / self.width)
        elif module not in TABLES:
            scale[d:] = 1 / self.eps_z if module in _READS else self.eps_z
        return scale


@dataclass(frozen=True)
class HFContent:
    """The content of a Hugging Face directory, before it is written."""

    form: StockForm
    config: Mapping[str, Any]  # content of config.json
    specs: Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype)
    tensor: Callable[[str], np.ndarray]  # processes call it together
    report: Mapping[str, Any]  # entries of the report
    manifest: Mapping[str, Any] = field(default_factory=dict)  # more entries of zflora.json


def module_of(place: Place) -> str:
    """The parent of a leaf in the native tree: "q", "embed", ...; of a bias "q_bias"."""
    module, parameter = place.leaf.split("/")[-2:]
    return f"{module}_bias" if parameter == "bias" else module


def stock_form(model: Model, dtype: str, eps_z: float | None = None) -> StockForm:
    """The stock form of a model, eps_z as given or chosen for the export's `dtype`; ConfigError if
    the model is packed or eps_z cannot be used.
    """
    require(
        not model.config.execution.packed,
        "a packed model is a layout for decode and cannot be exported; export the model it was"
        " packed from.",
    )
    if eps_z is None:
        return StockForm(model.config, choose_eps_z(model, dtype))
    require(
        eps_z in CHOICES,
        f"eps_z={eps_z!r}: must be a power of two from 2^-10 = {CHOICES[-1]} to 1, e.g. 0.0625."
        " Small values keep float logits exact, large ones (0.0625 and above) keep int8 consumers"
        " exact; leave it out to have it chosen from the weights.",
    )
    require(
        scales_state(model.config),
        f"eps_z={eps_z!r} scales the residual state of the zflora methods (and the adapter dims of"
        " heads that are normed), and this model has none; leave it out.",
    )
    return StockForm(model.config, eps_z)


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
    """A native leaf of one layer on the host, floats or codes. Processes call this together."""
    leaf = functools.reduce(operator.getitem, place.leaf.split("/"), model.params)
    return jax.tree.map(lambda part: trees.on_host(part, place.layer), leaf)


def native_tensor(model: Model, name: str) -> tuple[Place, np.ndarray]:
    """A name's place, and its native leaf of one layer in float32. Processes call this together."""
    place = hf_table(model.config)[name]
    return place, np.asarray(native_leaf(model, place).astype(np.float32))


def to_stock(model: Model, dtype: str, eps_z: float | None = None) -> HFContent:
    """A base or fused model in stock form; arguments and errors as for `stock_form`.

    Arithmetic is in float32 with one cast to `dtype`; values that stock form does not change are
    copied bit for bit. Tensors raise CheckpointError if not finite in `dtype`.
    """
    require_format(model.config.family, "hf", model.config.base_head_dim is not None)
    return stored_form(model, stock_form(model, dtype, eps_z), dtype)


def stored_form(model: Model, form: StockForm, dtype: str) -> HFContent:
    """A model in a given stock form; see `to_stock`."""
    table = hf_table(form.config)
    names, specs = members(table), {n: (shape, dtype) for n, shape in hf_shapes(table).items()}

    def rows(name: str) -> np.ndarray:
        return as_finite(form.tensor(model, name), np.dtype(dtype), name, "the model")

    def tensor(name: str) -> np.ndarray:
        first, *others = map(rows, names[name])
        return np.concatenate([first, *others]) if others else first

    config = to_hf_config(form.config, dtype, form.rope)
    report = {"parameters": count_base(form.config), **widths_report(model.config, form.config)}
    report |= {"eps_z": form.eps_z} if scales_state(model.config) else {}
    return HFContent(form, config, specs, tensor, report)


# --- eps_z ----------------------------------------------------------------------------------------


def choose_eps_z(model: Model, dtype: str) -> float:
    """The largest power of two in 2^-10..1 whose estimated effect on the logits, times 4, is below
    the rounding of `dtype`; 1 for a model without a state.
    """
    share = state_share(model)
    fits = [eps for eps in CHOICES if _SAFETY * share * eps**2 / 2 <= _ERROR[dtype]]
    chosen = fits[0] if fits else CHOICES[-1]
    return max(chosen, FLOAT16_LEAST) if dtype == "float16" else chosen


def state_share(model: Model) -> float:
    """Estimates |z|^2 / |x|^2 in the residual stream of a fused model from its weights.

    The o and down kernels map one input to the state z and to the base channels x. For inputs
    without a preferred direction, the ratio of energies is that of the columns' squared Frobenius
    norms, and a sum of contributions has at most the largest share of a single one. The embedding
    adds to x only, so it makes the share smaller. Adapter dims of normed heads: the same, from the
    q and k kernels.
    """
    config, shares = model.config, [0.0]
    # kernel -> (channels of the base that it writes, axes of them)
    writes = {"o": (config.base_width, 1), "down": (config.base_width, 1)}
    if config.traits.qk_norm:
        writes |= {"q": (config.base_head_width, 2), "k": (config.base_head_width, 2)}
    for name, leaf in trees.flatten(model.params).items():
        module, parameter = name.split("/")[-2:]
        base, axes = writes.get(module, (leaf.shape[-1], 1))
        if parameter == "kernel" and base < leaf.shape[-1]:
            energy = _energy(leaf, tuple(range(name.startswith("layers/"), leaf.ndim - axes)))
            state, rest = jnp.sum(energy[..., base:], -1), jnp.sum(energy[..., :base], -1)
            shares.append(float(jnp.max(jnp.where(state > 0, state / rest, 0.0))))
    return max(shares)


def scales_state(config: LlamaConfig) -> bool:
    """Whether a model has a residual state or adapter dims of normed heads, stored times eps_z."""
    heads = config.traits.qk_norm and config.base_head_dim is not None
    return heads or config.base_hidden_size is not None


@functools.partial(jax.jit, static_argnums=1)
def _energy(leaf: Any, axes: tuple[int, ...]) -> jax.Array:
    """Sum of squares over `axes`, float32; compiled, so that no float32 copy is made."""
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
