"""Names and layouts: one two-way table between Hugging Face's Llama tensors and the native
parameter tree, and the strict accounting of both.

Hugging Face stores a linear layer as (out, in) over flattened axes; a native kernel is [*in, *out]
with heads on an axis of their own.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zflora_jax.core.architecture import group, kernel_shapes
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import difference


class CheckpointError(ValueError):
    """A file or directory that cannot be used as it is; the message names it, what is wrong with it
    and, where there is one, the fix.
    """


# One layer: native name -> Hugging Face name. PEFT uses the same module names.
LAYER_NAMES = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"attn/{kernel}/kernel": f"self_attn.{kernel}_proj.weight" for kernel in "qkvo"},
    **{f"mlp/{kernel}/kernel": f"mlp.{kernel}_proj.weight" for kernel in ("gate", "up", "down")},
}
TOP_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}

# Buffers that old files carry; transformers computes them from the config and never reads them.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


Part = tuple[slice, ...]
"""What to take along each axis: start and stop are given, there is no step."""


def whole(shape: tuple[int, ...]) -> Part:
    """The Part that is everything."""
    return tuple(slice(0, n) for n in shape)


def part_shape(part: Part) -> tuple[int, ...]:
    return tuple(cut.stop - cut.start for cut in part)


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor lives in the native tree.

    leaf: name of the native leaf. layer: its row of a stacked leaf ("layers/..."), else None.
    shape: native shape without the layer axis. in_axes: how many leading axes of `shape` the kernel
    reads from; 0 for norm gains and the embedding, which are stored alike in both.
    """

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    in_axes: int = 0

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.in_axes:
            return self.shape
        return math.prod(self.shape[self.in_axes :]), math.prod(self.shape[: self.in_axes])

    def to_native(self, array: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The Hugging Face tensor, or a part of it whose native shape is `shape`, in native layout
        (a view).
        """
        return array.T.reshape(self.shape if shape is None else shape) if self.in_axes else array

    def hf_part(self, part: Part) -> Part:
        """The slices of the Hugging Face tensor that hold the native slices `part`. Of axes that it
        stores as one, only the first may be cut.
        """
        if not self.in_axes:
            return part

        def joined(start: int, stop: int) -> slice:
            first, *rest = part[start:stop]
            if any(
                cut != slice(0, size)
                for cut, size in zip(rest, self.shape[start + 1 : stop], strict=True)
            ):
                raise ValueError(
                    f"{self.leaf}: {part} of {self.shape} is no block of rows and columns in"
                    " Hugging Face's layout."
                )
            inner = math.prod(self.shape[start + 1 : stop])
            return slice(first.start * inner, first.stop * inner)

        return joined(self.in_axes, len(self.shape)), joined(0, self.in_axes)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_native` (a view where the axes allow)."""
        return array.reshape(self.hf_shape[::-1]).T if self.in_axes else array


def hf_table(config: LlamaConfig) -> dict[str, Place]:
    """Hugging Face name -> Place, for every parameter of an unpacked model of this config."""
    d, v = config.hidden_size, config.vocab_size
    table = {
        TOP_NAMES["embed/embedding"]: Place("embed/embedding", None, (v, d)),
        TOP_NAMES["final_norm/scale"]: Place("final_norm/scale", None, (d,)),
    }
    if not config.tie_word_embeddings:
        table[TOP_NAMES["lm_head/kernel"]] = Place("lm_head/kernel", None, (d, v), 1)
    shapes: dict[str, tuple[tuple[int, ...], int]] = {
        "attn_norm/scale": ((d,), 0),
        "mlp_norm/scale": ((d,), 0),
    }
    shapes |= {
        f"{group(name)}/{name}/kernel": (i + o, len(i))
        for name, (i, o) in kernel_shapes(config).items()
    }
    for layer in range(config.num_layers):
        for native, hf in LAYER_NAMES.items():
            shape, in_axes = shapes[native]
            leaf, row = (
                (f"layers/{native}", layer)
                if config.execution.scan_layers
                else (f"layers_{layer}/{native}", None)
            )
            table[f"model.layers.{layer}.{hf}"] = Place(leaf, row, shape, in_axes)
    return table


def check_tensors(
    table: Mapping[str, Place], given: Mapping[str, tuple[int, ...]], what: str, num_layers: int
) -> None:
    """CheckpointError naming every tensor of `given` (name -> shape) that is missing, unexpected or
    misshapen against `table`.
    """
    if diff := difference(table, given):
        raise CheckpointError(
            f"{what} does not hold the tensors of a {num_layers}-layer Llama:\n{diff}"
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


def check_layer_count(names: Iterable[str], pattern: str, num_layers: int, what: str) -> None:
    """Refuse a layer count that the file does not back, before a table of that many layers is
    built.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if num_layers > len(found):
        raise CheckpointError(
            f"{what}: its config says {num_layers} layers, its tensors belong to {len(found)}."
        )


def as_finite(array: np.ndarray, dtype: Any, name: str, what: str) -> np.ndarray:
    """`array` cast to `dtype`; CheckpointError if it is no float array, or holds a value that is
    not finite in `dtype`.
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
    read: Callable[[str, Place, Part], np.ndarray],
    dtype: Any,
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> dict[str, Any]:
    """The native leaves, flat: name -> jax array in `dtype`.

    read(hf_name, place, part): that part of a tensor in native layout, any float dtype.
    sharding(name, shape): where a leaf goes; only the parts that this process's devices hold are
    read then. None: whole, on the first device. One leaf is assembled at a time and handed to jax,
    so that beyond the model itself only the largest leaf is held twice.
    """
    import jax
    import jax.numpy as jnp

    by_leaf: dict[str, list[tuple[str, Place]]] = {}
    for name, place in table.items():
        by_leaf.setdefault(place.leaf, []).append((name, place))
    leaves = {}
    for leaf, members in sorted(by_leaf.items()):
        stacked = members[0][1].layer is not None
        shape = (len(members),) * stacked + members[0][1].shape
        assemble = _assembler(
            {place.layer: (name, place) for name, place in members}, shape, read, dtype
        )
        leaves[leaf] = (
            jnp.asarray(assemble(None))
            if sharding is None
            else jax.make_array_from_callback(shape, sharding(leaf, shape), assemble)
        )
    return leaves


def _assembler(
    rows: Mapping[int | None, tuple[str, Place]],
    shape: tuple[int, ...],
    read: Callable[[str, Place, Part], np.ndarray],
    dtype: Any,
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """index -> that part of a leaf, read anew only where it was not just read: copies of the model
    on several devices share it.
    """

    @functools.cache
    def at(bounds: tuple[tuple[int, ...], ...]) -> np.ndarray:
        part = tuple(slice(*pair) for pair in bounds)
        if None in rows:
            return read(*rows[None], part).astype(dtype, copy=False)
        buffer = np.empty(part_shape(part), dtype)
        for i in range(part[0].start, part[0].stop):
            buffer[i - part[0].start] = read(*rows[i], part[1:])
        return buffer

    def assemble(index: tuple[slice, ...] | None) -> np.ndarray:
        return at(
            tuple(cut.indices(n)[:2] for cut, n in zip(index or whole(shape), shape, strict=True))
        )

    return assemble
