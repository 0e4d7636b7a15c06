"""From the native fused form to the stock form of Hugging Face's classes, and back.

A native fused model computes RMSNorm over the base channels, rotates the base dims of a head and
divides scores by sqrt(k). Stock classes do all three over the full width. Stock form computes the
same function by changing only weights and settings:

- residual d+r: padded with zero channels to a width D that is a multiple of the heads; the adapter
  state stored times eps_z (see `choose_eps_z`), so that it hardly changes the mean square; norm
  gains times sqrt(d/D), rms_norm_eps times d/D.
- heads k+e: base dims moved to the places that RoPE pairs up, [0, k/2) and [(k+e)/2, (k+e)/2 +
  k/2), in both q and k; q times sqrt((k+e)/k); RoPE settings that give the base's pairs their
  frequencies and hardly rotate the adapter's (see `widened_rope`).
- norms of heads (q_norm, k_norm): adapter dims of q and k stored times eps_z, their gains divided
  by it; gains of k times sqrt(k/(k+e)): the factors of q and of the scores cancel. There is one
  rms_norm_eps, the residual stream's; the error in the heads' is far below their sums of squares.

Letters: d residual width, k head dim, r and e the channels that an adapter adds, D padded width.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS, QK_NORMS, count_base
from zflora_jax.core.fields import Bounds, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.hf.config import to_hf_config
from zflora_jax.hf.keys import Place, as_finite, hf_shapes, hf_table
from zflora_jax.ops.rope import paired_order, rope_frequencies

_READS = ("q", "k", "v", "gate", "up")
_WRITES = ("o", "down")
_NORMS = ("attn_norm", "mlp_norm", "final_norm")
_ROTATED = ("q", "k", "q_bias", "k_bias", *QK_NORMS)  # leaves with the order of heads' dims
TABLES = ("embed", "lm_head")  # as wide as the base; stock form pads them with zeros

CHOICES = tuple(2.0**-k for k in range(11))  # 1, 1/2, ... 2^-10
ScaleOfState = Annotated[float, Bounds("a power of two from 2^-10 to 1", lambda x: x in CHOICES)]
# Rows that read the state are divided by eps_z; below this they leave the range of float16.
FLOAT16_LEAST = 2.0**-4

# The relative error of the logits that eps_z may cause: for float32, the rounding error of a whole
# model's logits (SmolLM2-135M: 1.8e-6 of the largest); else half a unit in the last place.
_ERROR = {"float32": 2.0**-19, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# The effect may exceed the estimate: 1.4 times in SmolLM2-135M, up to 3 in random models.
_SAFETY = 4.0
_MOST_SHARE = 1e30  # of a base of zeros

# Divides an inverse frequency to zero and stays finite in float32 when multiplied by any theta
NO_ROTATION = 1e30
CUT = 1e10  # the same for `widened_rope`: 1e-9 rad at 10 million positions
# Rotation of an adapter's pair at the last position, in radian; Llama 3.1: 0.033, 3.2: 0.008.
LARGEST_ANGLE = 0.05


@dataclass(frozen=True)
class StockForm:
    """The stock form of a native model.

    `module` in the methods is the result of `module_of`: "q", "embed", ...
    """

    native: LlamaConfig
    eps_z: float  # scale of the stored state and of the adapter dims of normed heads
    # Divisor of the stored hidden size; None: the number of heads, which transformers 5 requires.
    multiple: int | None = None
    # Whether q lacks the factor sqrt((k+e)/k) of scores: a GGUF file has its root in the RoPE
    # settings, for both q and k.
    scores_in_rope: bool = False

    @property
    def wider(self) -> float:
        """sqrt((k+e)/k), the excess factor by which stock classes divide the scores."""
        return math.sqrt(self.native.head_dim / self.native.base_head_width)

    @functools.cached_property
    def width(self) -> int:
        """D, the stored hidden size; unchanged for a residual stream that is not widened."""
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
    def hf_config(self) -> LlamaConfig:
        """`config` with the RoPE settings of a Hugging Face directory."""
        theta, scaling = widened_rope(self.native)
        return self.config.replace(rope_theta=theta, rope_scaling=scaling)

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
        """True if stock form rounds a module, so that an export stores its native floats too."""
        n = self.native
        if module in _NORMS:
            return n.base_hidden_size is not None
        rounded = ("k_norm",) if n.traits.qk_norm else ("q", "q_bias")
        return module in rounded and n.base_head_dim is not None

    def tensor(self, model: Model, name: str) -> np.ndarray:
        """The tensor of a name of `hf_table` in stock form, float32, with zeros up to the widths of
        this form. Processes call this together.
        """
        return self.stored(name, native_tensor(model, name)[1])

    def stored(self, name: str, x: np.ndarray) -> np.ndarray:
        """Converts a native leaf of one layer, float32, to the result of `tensor`."""
        place = hf_table(self.config)[name]
        wanted = hf_table(self.native)[name].shape
        x = np.pad(x, [(0, b - a) for a, b in zip(x.shape, wanted, strict=True)])
        return place.to_hf(self.convert(module_of(place), x))

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
        """The inverse of `convert` for a leaf without its padding; exact unless `restored`."""
        axis = self._residual_axis(module, x.ndim)
        if axis is not None:
            scale = self._scale(module, x.shape[axis])
            x = np.moveaxis(np.moveaxis(x, axis, -1) / scale, -1, axis)
        return self.inverse_heads(module, x)

    def rotated(self, module: str) -> bool:
        """True if a leaf has dims of widened heads, reordered and scaled for stock RoPE."""
        return self.native.base_head_dim is not None and module in _ROTATED

    def inverse_heads(self, module: str, x: np.ndarray, *, state: bool = True) -> np.ndarray:
        """The part of `inverse` for heads. state: Whether eps_z is undone."""
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


def widened_rope(native: LlamaConfig) -> tuple[float, RopeScaling | None]:
    """Returns the rope_theta and rope_scaling with which stock RoPE over a whole head rotates the
    base's pairs as in the base. Models without widened heads keep theirs.

    With theta' = theta^((k+e)/k) the frequencies of a head of k+e dims begin with the base's, and
    the adapter's pairs follow with frequencies of at most 1/theta. A base with Llama 3's scaling
    keeps it: the adapter's pairs rotate by at most p / (theta factor) at position p. Any other base
    gets Llama 3's scaling as a cut between the two, which stops the adapter's pairs. Servers in
    JAX read this form; they ignore or refuse the equivalent `longrope` factors.
    """
    theta, k = native.rope_theta, native.base_head_width
    scaling, length = native.rope_scaling, native.max_position_embeddings
    if native.base_head_dim is None:
        return theta, scaling
    if scaling is None:
        original = max(1, length // 2)  # only a unit; transformers needs less than the length
        # Wavelengths: 2 pi theta^(1 - 2/k) of the base's last pair, 2 pi theta of the adapter's
        # first. The band of the interpolation lies between them.
        low, high = (original / (2 * math.pi * theta ** (1 - x / k)) for x in (0.5, 1.5))
        scaling = RopeScaling(CUT, low, high, original)
    return theta ** (native.head_dim / k), scaling


def _warn_of_turning(native: LlamaConfig) -> None:
    """Warns if `widened_rope` rotates the adapter's pairs by more than LARGEST_ANGLE."""
    scaling, theta, length = native.rope_scaling, native.rope_theta, native.max_position_embeddings
    if native.base_head_dim is None or scaling is None:
        return
    if (angle := length / (theta * scaling.factor)) > LARGEST_ANGLE:
        warnings.warn(
            f"the adapter's dims of heads rotate by up to {angle:.2g} rad within"
            f" max_position_embeddings={length} in this export, because its base has"
            f" rope_theta={theta:g} with Llama 3's scaling by {scaling.factor:g}. Compare its"
            " logits at long prompts, or fuse a method that does not widen the heads.",
            stacklevel=3,
        )


def module_of(place: Place) -> str:
    """The parent of a leaf in the native tree: "q", "embed", ...; "q_bias" for a bias."""
    module, parameter = place.leaf.split("/")[-2:]
    return f"{module}_bias" if parameter == "bias" else module


def stock_form(model: Model, dtype: str, eps_z: float | None = None) -> StockForm:
    """The stock form of a model, with eps_z or the one chosen for the export's `dtype`. ConfigError
    if the model is packed or eps_z cannot be used.
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
    """A base or fused model in stock form; arguments and errors are those of `stock_form`.

    Arithmetic is in float32 with one cast to `dtype`; values that stock form does not change are
    copied bit for bit. Reading a tensor raises CheckpointError if it is not finite in `dtype`.
    """
    return stored_form(model, stock_form(model, dtype, eps_z), dtype)


def stored_form(model: Model, form: StockForm, dtype: str) -> HFContent:
    """A model in a given stock form; see `to_stock`."""
    table = hf_table(form.config)
    specs = {name: (shape, dtype) for name, shape in hf_shapes(table).items()}

    def tensor(name: str) -> np.ndarray:
        return as_finite(form.tensor(model, name), np.dtype(dtype), name, "the model")

    _warn_of_turning(form.native)
    config = to_hf_config(form.hf_config, dtype)
    report = {"parameters": count_base(form.config), **widths_report(model.config, form.config)}
    report |= {"eps_z": form.eps_z} if scales_state(model.config) else {}
    return HFContent(form, config, specs, tensor, report, {"state_share": state_share(model)})


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
    adds only to x, so it makes the share smaller. For adapter dims of normed heads, the q and k
    kernels give the share in the same way.
    """
    return max(state_shares(model).values())


def state_shares(model: Model) -> dict[str, float]:
    """`state_share` of the residual stream ("residual") and of normed heads ("heads")."""
    config, shares = model.config, {"residual": 0.0, "heads": 0.0}
    # kernel -> (channels of the base that it writes, axes of them)
    writes = {"o": (config.base_width, 1), "down": (config.base_width, 1)}
    if config.traits.qk_norm:
        writes |= {"q": (config.base_head_width, 2), "k": (config.base_head_width, 2)}
    for name, leaf in trees.flatten(model.params).items():
        module, parameter = name.split("/")[-2:]
        base, axes = writes.get(module, (leaf.shape[-1], 1))
        if parameter == "kernel" and base < leaf.shape[-1]:
            axes = tuple(range(name.startswith("layers/"), leaf.ndim - axes))
            stream, found = KERNELS[module][1], float(_largest_share(leaf, axes, base))
            shares[stream] = max(shares[stream], found)
    return shares


def scales_state(config: LlamaConfig) -> bool:
    """True if a model has a residual state or adapter dims of normed heads, stored times eps_z."""
    heads = config.traits.qk_norm and config.base_head_dim is not None
    return heads or config.base_hidden_size is not None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _largest_share(leaf: Any, axes: tuple[int, ...], base: int) -> jax.Array:
    """The largest ratio of the energies behind and before `base` along the last axis, summed over
    `axes`; compiled, so that no float32 copy is made.
    """
    energy = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    state, rest = jnp.sum(energy[..., base:], -1), jnp.sum(energy[..., :base], -1)
    return jnp.max(jnp.where(state > 0, jnp.minimum(state / rest, _MOST_SHARE), 0.0))
