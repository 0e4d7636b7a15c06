"""Tensors of Hugging Face's models and leaves of the native tree: names, layouts, strict checks.

Hugging Face stores a linear layer as [out, in] over flattened axes; a native kernel is [*in, *out]
with an axis for heads. In families with joined kernels, one tensor holds the rows of several.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from zflora_jax.core.architecture import QK_NORMS, layer_shapes
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import difference
from zflora_jax.nn.quantize_model import check_tables, group_of, kernel_axes, stored_as
from zflora_jax.ops.quantized import QuantizedArray, quantize
from zflora_jax.parallel.devices import on_cpu
from zflora_jax.parallel.sharding import specs

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

# Buffers in old files; transformers computes them from the config and never reads them.
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
    """Rows of a Hugging Face tensor, and their place in the native tree."""

    leaf: str  # name of the native leaf
    layer: int | None  # index in a stacked leaf ("layers/..."), else None
    shape: tuple[int, ...]  # native, without the layer axis
    # Leading axes of `shape` that the kernel reads from; 0 for a bias; None for norm gains and the
    # embedding, which have the same layout in both.
    in_axes: int | None = None
    tensor: str = ""  # its name
    row: int = 0  # first of its rows in the tensor; not 0 for joined kernels only

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the rows."""
        if self.in_axes is None:
            return self.shape
        writes = math.prod(self.shape[self.in_axes :])
        return (writes, math.prod(self.shape[: self.in_axes])) if self.in_axes else (writes,)

    def to_native(self, array: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A view of the rows, or of a block of them with native `shape`, in native layout."""
        if self.in_axes is None:
            return array
        return array.T.reshape(self.shape if shape is None else shape)  # .T of a bias is itself

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_native`; a view where the axes allow it."""
        return array if self.in_axes is None else array.reshape(self.hf_shape[::-1]).T

    def hf_slices(self, slices: Slices) -> Slices:
        """The slices of the Hugging Face tensor that hold native ones; ValueError unless they are
        one block: of axes that Hugging Face flattens, only the first may be cut.
        """
        if self.in_axes is None:
            return slices

        def flat(start: int, stop: int, first: int) -> slice:
            cut, *rest = slices[start:stop]
            if tuple(rest) != whole(self.shape[start + 1 : stop]):
                raise ValueError(
                    f"{self.leaf}: {slices} of {self.shape} is no block of rows and columns in"
                    " Hugging Face's layout."
                )
            inner = math.prod(self.shape[start + 1 : stop])
            return slice(first + cut.start * inner, first + cut.stop * inner)

        rows = flat(self.in_axes, len(self.shape), self.row)
        return (rows, flat(0, self.in_axes, 0)) if self.in_axes else (rows,)

    def block(self, slices: Slices) -> tuple[Slices, Slices]:
        """The native slices, for `hf_slices`, of the smallest block of rows and columns that holds
        `slices`, and the place of `slices` in it.
        """
        if self.in_axes is None:
            return slices, whole(slices_shape(slices))
        first = (0, self.in_axes)
        outer = tuple(
            cut if axis in first else slice(0, n)
            for axis, (cut, n) in enumerate(zip(slices, self.shape, strict=True))
        )
        pairs = zip(slices, outer, strict=True)
        return outer, tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


@functools.lru_cache(maxsize=16)
def hf_table(config: LlamaConfig) -> Mapping[str, Place]:
    """Hugging Face name -> Place, for every parameter of an unpacked model. Joined kernels have the
    names that they would have separately, in the order of their rows.
    """
    d, b, v = config.hidden_size, config.norm_dim, config.vocab_size
    places = [
        ("embed/embedding", Place("embed/embedding", None, (v, b))),
        ("final_norm/scale", Place("final_norm/scale", None, (d,))),
    ]
    if not config.tie_word_embeddings:
        places.append(("lm_head/kernel", Place("lm_head/kernel", None, (b, v), 1)))
    table = {TOP_NAMES[name]: replace(place, tensor=TOP_NAMES[name]) for name, place in places}
    joined = {kernel: name for name, of in config.traits.joined.items() for kernel in of}
    for layer in range(config.num_layers):
        rows: dict[str, int] = {}
        for native, (shape, in_axes) in layer_shapes(config).items():
            stacked = config.execution.scan_layers
            leaf = f"layers/{native}" if stacked else f"layers_{layer}/{native}"
            place = Place(leaf, layer if stacked else None, shape, in_axes)
            name = f"model.layers.{layer}.{LAYER_NAMES[native]}"
            kernel = native.split("/")[-2]
            tensor = name.replace(f".{kernel}_proj.", f".{joined.get(kernel, kernel)}_proj.")
            table[name] = replace(place, tensor=tensor, row=rows.get(tensor, 0))
            rows[tensor] = rows.get(tensor, 0) + place.hf_shape[0]
    return table


def hf_shapes(table: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, of all tensors of a table."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in table.values():
        rows, *columns = place.hf_shape
        shapes[place.tensor] = place.row + rows, *columns
    return shapes


def members(table: Mapping[str, Place]) -> dict[str, list[str]]:
    """Tensor -> the names of its places, in the order of their rows."""
    names: dict[str, list[str]] = {}
    for name, place in table.items():
        names.setdefault(place.tensor, []).append(name)
    return names


def check_tensors(
    table: Mapping[str, Place], given: Mapping[str, tuple[int, ...]], what: str, num_layers: int
) -> None:
    """CheckpointError that names missing, unexpected and misshapen tensors of the file `what`."""
    shapes = hf_shapes(table)
    if diff := difference(shapes, given):
        raise CheckpointError(
            f"{what} does not hold the tensors of its config's {num_layers} layers:\n{diff}"
        )
    wrong = [
        f"{name}: {tuple(given[name])}, expected {shape}"
        for name, shape in shapes.items()
        if tuple(given[name]) != shape
    ]
    if wrong:
        more = f"\n... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise CheckpointError(
            f"{what}: tensors of the wrong shape for its config:\n" + "\n".join(wrong[:12]) + more
        )


def check_layer_count(names: Iterable[str], num_layers: int, what: str) -> None:
    """CheckpointError if the tensors of the file `what` belong to fewer layers than its config
    announces; checked before a table of so many is built.
    """
    found = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    if num_layers > len(found):
        raise CheckpointError(
            f"{what}: its config says {num_layers} layers, its tensors belong to {len(found)}."
        )


def as_finite(array: np.ndarray, dtype: Any, name: str, what: str) -> np.ndarray:
    """Casts the tensor `name` of the file `what`; CheckpointError if it is not floating point, or a
    value is not finite in `dtype`.
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


Read = Callable[[str, Place, Slices], np.ndarray]
"""(Hugging Face name, place, native slices) -> that block in native layout, of any float dtype."""


def gather(
    table: Mapping[str, Place],
    read: Read,
    dtype: Any,
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
    whole_leaf: Callable[[str, list[tuple[str, Place]]], Any] | None = None,
) -> dict[str, Any]:
    """Assembles the native leaves of a model, one at a time, so only the largest is in memory
    twice.

    Args:
      table: Hugging Face name -> Place.
      read: Reader of blocks.
      dtype: Data type of the leaves.
      sharding: (leaf name, shape) -> sharding of a leaf; only the blocks of this process's devices
        are read then. None: whole, on the first device.
      whole_leaf: (leaf name, its places by name) -> the leaf; None to assemble it from floats.
    """
    by_leaf: dict[str, list[tuple[str, Place]]] = {}
    for name, place in table.items():
        by_leaf.setdefault(place.leaf, []).append((name, place))
    leaves = {}
    for leaf, members in sorted(by_leaf.items()):
        made = None if whole_leaf is None else whole_leaf(leaf, members)
        if made is None:
            stacked = members[0][1].layer is not None
            shape = (len(members),) * stacked + members[0][1].shape
            assemble = _assembler({p.layer: (name, p) for name, p in members}, shape, read, dtype)
            made = (
                jax.device_put(assemble(None))
                if sharding is None
                else jax.make_array_from_callback(shape, sharding(leaf, shape), assemble)
            )
        leaves[leaf] = made
    return leaves


def _assembler(
    rows: Mapping[int | None, tuple[str, Place]], shape: tuple[int, ...], read: Read, dtype: Any
) -> Callable[[Slices | None], np.ndarray]:
    """A function index -> that block of a leaf. Blocks are kept until the leaf is done: copies on
    several devices ask for the same one.
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

    def assemble(index: Slices | None) -> np.ndarray:
        cuts = zip(index or whole(shape), shape, strict=True)
        return at(tuple(cut.indices(n)[:2] for cut, n in cuts))

    return assemble


# --- quantised leaves -----------------------------------------------------------------------------

Members = list[tuple[str, Place]]  # names and places of a leaf's tensors


@dataclass(frozen=True)
class QuantizedLeaves:
    """The leaves that a loader stores as codes: the `whole_leaf` of `gather`."""

    config: LlamaConfig
    how: QuantizeConfig  # types of the leaves
    mesh: Any  # that leaves are divided over; None: whole, on the first device
    read: Read  # reader of floats
    # A tensor's type in the file, and why its blocks cannot be kept: "" if the type says it, None
    # if they can.
    in_file: Callable[[str, Place], tuple[str, str | None]] = lambda *_: ("numbers", "")
    blocks: Callable[[str, Place], QuantizedArray] | None = None  # their reader, in native layout
    left: dict[str, str] = field(
        default_factory=dict
    )  # leaves that should be kept and are read as floats, with the reasons

    @property
    def left_text(self) -> str:
        """The modules in `left`, by reason."""
        modules: dict[str, dict[str, None]] = {}
        for leaf, reason in self.left.items():
            modules.setdefault(reason, {})[leaf.split("/")[-2]] = None
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in modules.items())

    def __post_init__(self) -> None:
        check_tables(self.config, self.how)

    def __call__(self, leaf: str, members: Members) -> QuantizedArray | None:
        kind = stored_as(leaf, self.how)
        if kind == "none":
            return None
        if kind == "keep":
            reason = self._why_not_kept(members)
            if reason is not None or self.blocks is None:
                self.left[leaf] = reason or ""
                return None
            return self._assembled(leaf, members, self.blocks)
        axes = kernel_axes(self.config, leaf)
        group = group_of(leaf, kind, self.how, members[0][1].shape[-axes["writes"] - 1])

        def made(name: str, place: Place) -> QuantizedArray:
            return quantized(self.read(name, place, whole(place.shape)), kind, group=group, **axes)

        return self._assembled(leaf, members, made)

    def _assembled(
        self, leaf: str, members: Members, made: Callable[[str, Place], QuantizedArray]
    ) -> QuantizedArray:
        """One leaf from the codes of its tensors, of which one is in memory as floats. Every
        process reads whole tensors, because groups may go across slices of the mesh.
        """
        found: Any = None
        for name, place in members:
            row = jax.tree.map(np.asarray, made(name, place))
            if place.layer is None:
                found = row
                continue
            if found is None:
                found = jax.tree.map(lambda p: np.empty((len(members), *p.shape), p.dtype), row)
            for stacked, part in zip(jax.tree.leaves(found), jax.tree.leaves(row), strict=True):
                stacked[place.layer] = part
        if self.mesh is None:
            return jax.device_put(found)

        def divided(part: np.ndarray, at: Any) -> jax.Array:
            where = jax.sharding.NamedSharding(self.mesh, at)
            return jax.make_array_from_callback(part.shape, where, part.__getitem__)

        return jax.tree.map(divided, found, specs(leaf, found, self.mesh))

    def _why_not_kept(self, members: Members) -> str | None:
        """The types of a leaf's tensors, and why they cannot be one leaf of blocks; None if they
        can.
        """
        found = dict(self.in_file(name, place) for name, place in members)
        reasons = {why for why in found.values() if why}
        if set(found.values()) == {None}:
            if len(found) == 1:
                return None
            reasons = {", each in some of the layers, which are one array"}
        return ", ".join(sorted(found)) + "".join(sorted(reasons))


_quantize = jax.jit(quantize, static_argnames=("kind", "reads", "writes", "group"))


def quantized(x: np.ndarray, kind: str, *, reads: int, writes: int, group: int) -> QuantizedArray:
    """`quantize` on the CPU, whatever the devices are: a run knows its base by its codes, and GPUs
    may round a value between two codes to the other one.
    """
    with on_cpu():
        return _quantize(x, kind, reads=reads, writes=writes, group=group)


def whole_groups(place: Place, group: int) -> bool:
    """Whether no group of a tensor holds values of two heads."""
    return place.in_axes is None or place.shape[place.in_axes - 1] % group == 0


def native_blocks(blocks: QuantizedArray, place: Place) -> QuantizedArray:
    """The kernel [*in, *out] of codes and scales [out, in], grouped along the last axis, for a
    place with `whole_groups`; a table as it is.
    """
    reads = place.in_axes
    if reads is None:
        return blocks
    inner = place.shape[reads - 1]  # the last of the input axes

    def native(part: np.ndarray, each: int) -> np.ndarray:
        inputs = (*place.shape[: reads - 1], inner // each)
        return part.T.reshape(*inputs, *place.shape[reads:])

    return replace(
        blocks,
        codes=native(blocks.codes, 1),
        scales=native(blocks.scales, blocks.group),
        mins=None if blocks.mins is None else native(blocks.mins, blocks.group),
        reads=reads,
        writes=len(place.shape) - reads,
        base=inner,
    )
