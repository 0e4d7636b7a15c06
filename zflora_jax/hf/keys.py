"""Tensors of Hugging Face's models and leaves of the native tree: names, layouts, strict checks.

Hugging Face stores a linear layer as [out, in] over flattened axes; a native kernel is [*in, *out]
with heads on an axis of their own.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zflora_jax.core.architecture import QK_NORMS, layer_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import difference

# One layer: native name -> Hugging Face name. PEFT uses the same module names.
LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attn/{kernel}/kernel": f"self_attn.{kernel}_proj.weight" for kernel in "qkvo"},
    **{f"attn/{kernel}/bias": f"self_attn.{kernel}_proj.bias" for kernel in "qkv"},
    **{f"attn/{norm}/scale": f"self_attn.{norm}.weight" for norm in QK_NORMS},
    **{f"mlp/{kernel}/kernel": f"mlp.{kernel}_proj.weight" for kernel in ("gate", "up", "down")},
}
TOP_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}

# Buffers that old files carry; transformers computes them from the config and never reads them.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")  # the start of a layer's tensors, with its index


Slices = tuple[slice, ...]
"""A block of an array: one slice per axis, with start and stop and without a step."""


def whole(shape: tuple[int, ...]) -> Slices:
    """The slices that take everything of an array of this shape."""
    return tuple(slice(0, n) for n in shape)


def slices_shape(slices: Slices) -> tuple[int, ...]:
    """The shape of an array after it is cut by `slices`."""
    return tuple(cut.stop - cut.start for cut in slices)


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lies in the native tree.

    Attributes:
      leaf: name of the native leaf.
      layer: its index in a stacked leaf ("layers/..."); None for other leaves.
      shape: native shape, without the layer axis.
      in_axes: number of leading axes of `shape` that the kernel reads from; 0 for a bias; None for
        norm gains and the embedding, which have the same layout in both.
    """

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    in_axes: int | None = None

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the Hugging Face tensor."""
        if self.in_axes is None:
            return self.shape
        writes = math.prod(self.shape[self.in_axes :])
        return (writes, math.prod(self.shape[: self.in_axes])) if self.in_axes else (writes,)

    def to_native(self, array: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Bring a Hugging Face tensor into native layout.

        Args:
          array: the tensor, or a block of it.
          shape: native shape of the block; None: the whole tensor.

        Returns:
          A view of `array`.
        """
        if self.in_axes is None:
            return array
        return array.T.reshape(self.shape if shape is None else shape)  # .T of a bias is itself

    def hf_slices(self, slices: Slices) -> Slices:
        """The slices of the Hugging Face tensor that hold the native slices `slices`.

        Raises:
          ValueError: they are not one block; of axes that Hugging Face flattens only the first may
            be cut.
        """
        if self.in_axes is None:
            return slices

        def joined(start: int, stop: int) -> slice:
            first, *rest = slices[start:stop]
            if any(
                cut != slice(0, size)
                for cut, size in zip(rest, self.shape[start + 1 : stop], strict=True)
            ):
                raise ValueError(
                    f"{self.leaf}: {slices} of {self.shape} is no block of rows and columns in"
                    " Hugging Face's layout."
                )
            inner = math.prod(self.shape[start + 1 : stop])
            return slice(first.start * inner, first.stop * inner)

        writes = joined(self.in_axes, len(self.shape))
        return (writes, joined(0, self.in_axes)) if self.in_axes else (writes,)

    def block(self, slices: Slices) -> tuple[Slices, Slices]:
        """The smallest block of rows and columns in Hugging Face's layout that holds `slices`.

        Returns:
          (its native slices, which `hf_slices` takes; where `slices` lie in it).
        """
        outer, reads = list(slices), self.in_axes or 0
        for start, stop in (
            ((0, reads), (reads, len(self.shape))) if self.in_axes is not None else ()
        ):
            for axis in range(start + 1, stop):
                outer[axis] = slice(0, self.shape[axis])
        inner = tuple(
            slice(cut.start - of.start, cut.stop - of.start)
            for cut, of in zip(slices, outer, strict=True)
        )
        return tuple(outer), inner

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_native`; a view where the axes allow it."""
        return array if self.in_axes is None else array.reshape(self.hf_shape[::-1]).T


def hf_table(config: LlamaConfig) -> dict[str, Place]:
    """Hugging Face name -> Place, for every parameter of an unpacked model of this config."""
    d, b, v = config.hidden_size, config.norm_dim, config.vocab_size
    table = {
        TOP_NAMES["embed/embedding"]: Place("embed/embedding", None, (v, b)),
        TOP_NAMES["final_norm/scale"]: Place("final_norm/scale", None, (d,)),
    }
    if not config.tie_word_embeddings:
        table[TOP_NAMES["lm_head/kernel"]] = Place("lm_head/kernel", None, (b, v), 1)
    shapes = layer_shapes(config)
    for layer in range(config.num_layers):
        for native, (shape, in_axes) in shapes.items():
            leaf, row = (
                (f"layers/{native}", layer)
                if config.execution.scan_layers
                else (f"layers_{layer}/{native}", None)
            )
            hf = LAYER_NAMES[native]
            table[f"model.layers.{layer}.{hf}"] = Place(leaf, row, shape, in_axes)
    return table


def check_tensors(
    table: Mapping[str, Place], given: Mapping[str, tuple[int, ...]], what: str, num_layers: int
) -> None:
    """Check that a file holds exactly the expected tensors.

    Args:
      table: the expected tensors by Hugging Face name.
      given: name -> shape of the tensors in the file.
      what: the file's name in messages.
      num_layers: of the model, for messages.

    Raises:
      CheckpointError: tensors are missing, unexpected or misshapen; each is named.
    """
    if diff := difference(table, given):
        raise CheckpointError(
            f"{what} does not hold the tensors of its config's {num_layers} layers:\n{diff}"
        )
    wrong = [
        f"{name}: {tuple(given[name])}, expected {place.hf_shape}"
        for name, place in table.items()
        if tuple(given[name]) != place.hf_shape
    ]
    if wrong:
        more = f"\n... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise CheckpointError(
            f"{what}: tensors of the wrong shape for its config:\n" + "\n".join(wrong[:12]) + more
        )


def check_layer_count(names: Iterable[str], num_layers: int, what: str) -> None:
    """Check that a file has the layers that its config announces, before a table of them is built.

    Args:
      names: Hugging Face's, of the tensors in the file.
      num_layers: of the config.
      what: the file's name in messages.

    Raises:
      CheckpointError: the file has fewer layers.
    """
    found = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    if num_layers > len(found):
        raise CheckpointError(
            f"{what}: its config says {num_layers} layers, its tensors belong to {len(found)}."
        )


def as_finite(array: np.ndarray, dtype: Any, name: str, what: str) -> np.ndarray:
    """Cast a tensor and check that it is finite.

    Args:
      array: of a floating-point dtype.
      dtype: of the result.
      name: the tensor's name in messages.
      what: the file's name in messages.

    Raises:
      CheckpointError: `array` is not floating point, or a value is not finite in `dtype`.
    """
    if array.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise CheckpointError(
            f"{what}: {name} has dtype {array.dtype.name}; expected floating point. Quantised"
            " checkpoints have to be dequantised first."
        )
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if not np.isfinite(cast).all():
        cause = (
            "holds NaN or infinite values"
            if not np.isfinite(array).all()
            else f"holds values beyond the range of {np.dtype(dtype).name}"
        )
        raise CheckpointError(f"{what}: {name} {cause}.")
    return cast


def gather(
    table: Mapping[str, Place],
    read: Callable[[str, Place, Slices], np.ndarray],
    dtype: Any,
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
    whole_leaf: Callable[[str, list[tuple[str, Place]]], Any] | None = None,
) -> dict[str, Any]:
    """Assemble the native leaves of a model.

    One leaf is assembled at a time and handed to jax, so only the largest leaf is in memory twice.

    Args:
      table: Hugging Face name -> Place.
      read: (Hugging Face name, place, slices) -> that block of a tensor, in native layout and any
        floating-point dtype.
      dtype: of the leaves.
      sharding: (leaf name, shape) -> sharding of a leaf; only the blocks that this process's
        devices hold are read then. None: whole, on the first device.
      whole_leaf: (leaf name, its tensors) -> the leaf where it is not assembled from numbers, else
        None.

    Returns:
      Leaf name -> jax array, or what `whole_leaf` gave.
    """
    by_leaf: dict[str, list[tuple[str, Place]]] = {}
    for name, place in table.items():
        by_leaf.setdefault(place.leaf, []).append((name, place))
    leaves = {}
    for leaf, members in sorted(by_leaf.items()):
        made = None if whole_leaf is None else whole_leaf(leaf, members)
        if made is not None:
            leaves[leaf] = made
            continue
        stacked = members[0][1].layer is not None
        shape = (len(members),) * stacked + members[0][1].shape
        assemble = _assembler(
            {place.layer: (name, place) for name, place in members}, shape, read, dtype
        )
        leaves[leaf] = (
            jax.device_put(assemble(None))
            if sharding is None
            else jax.make_array_from_callback(shape, sharding(leaf, shape), assemble)
        )
    return leaves


def _assembler(
    rows: Mapping[int | None, tuple[str, Place]],
    shape: tuple[int, ...],
    read: Callable[[str, Place, Slices], np.ndarray],
    dtype: Any,
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """A function index -> that block of a leaf. Blocks are kept until the leaf is done: copies of
    the model on several devices ask for the same one.
    """

    @functools.cache
    def at(bounds: tuple[tuple[int, ...], ...]) -> np.ndarray:
        slices = tuple(slice(*pair) for pair in bounds)
        if None in rows:
            block = read(*rows[None], slices).astype(dtype, copy=False)
            return np.require(block, requirements="O")  # not the file's pages
        buffer = np.empty(slices_shape(slices), dtype)
        for i in range(slices[0].start, slices[0].stop):
            buffer[i - slices[0].start] = read(*rows[i], slices[1:])
        return buffer

    def assemble(index: tuple[slice, ...] | None) -> np.ndarray:
        return at(
            tuple(cut.indices(n)[:2] for cut, n in zip(index or whole(shape), shape, strict=True))
        )

    return assemble
