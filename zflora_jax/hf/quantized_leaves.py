"""Leaves of codes and scales, assembled layer by layer from a file's tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.hf.keys import Place, Read, whole
from zflora_jax.nn.quantize_model import check_tables, group_of, kernel_axes, stored_as
from zflora_jax.ops.quantized import QuantizedArray, quantize
from zflora_jax.parallel.devices import on_cpu
from zflora_jax.parallel.sharding import specs

Members = list[tuple[str, Place]]  # names and places of a leaf's tensors


@dataclass(frozen=True)
class QuantizedLeaves:
    """The leaves that a loader stores as codes: the `whole_leaf` of `keys.gather`.

    Attributes:
      config: The model's config.
      how: Types of the leaves.
      mesh: Mesh that leaves are divided over; None: whole, on the first device.
      read: Reader of floats, as for `keys.gather`.
      in_file: A tensor's type in the file, and why its blocks cannot be kept: None if they can, ""
        if the type says it.
      blocks: Reader of these blocks in native layout.
      left: Collects the leaves that should be kept and are read as floats, with the reasons.
    """

    config: LlamaConfig
    how: QuantizeConfig
    mesh: Any
    read: Read
    in_file: Callable[[str, Place], tuple[str, str | None]] = lambda *_: ("numbers", "")
    blocks: Callable[[str, Place], QuantizedArray] | None = None
    left: dict[str, str] = field(default_factory=dict)

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
        """The leaf as codes, or None where it is to be floats."""
        kind = stored_as(leaf, self.how)
        if kind == "none":
            return None
        if kind == "keep":
            reason = self._why_not_kept(members)
            if reason is not None or self.blocks is None:
                self.left[leaf] = reason or ""
                return None
            return _leaf(leaf, members, self.blocks, self.mesh)
        axes = kernel_axes(self.config, leaf)
        group = group_of(leaf, kind, self.how, members[0][1].shape[-axes["writes"] - 1])

        def made(name: str, place: Place) -> QuantizedArray:
            return quantized(self.read(name, place, whole(place.shape)), kind, group=group, **axes)

        return _leaf(leaf, members, made, self.mesh)

    def _why_not_kept(self, members: Members) -> str | None:
        """The types of a leaf's tensors, and why their blocks are no leaf; None where they are."""
        found = dict(self.in_file(name, place) for name, place in members)
        reasons = {why for why in found.values() if why}
        if set(found.values()) == {None}:
            if len(found) == 1:
                return None
            reasons = {", each in some of the layers, which are one array"}
        return ", ".join(sorted(found)) + "".join(sorted(reasons))


def _leaf(
    leaf: str, members: Members, made: Callable[[str, Place], QuantizedArray], mesh: Any
) -> QuantizedArray:
    """One leaf of a model from the codes of its tensors; only one tensor is in memory as floats.
    Every process reads whole tensors, because groups may go across slices of the mesh.
    """
    buffers: QuantizedArray | None = None
    for name, place in members:
        row = jax.tree.map(np.asarray, made(name, place))
        if place.layer is None:
            buffers = row
            continue
        if buffers is None:
            buffers = jax.tree.map(lambda p: np.empty((len(members), *p.shape), p.dtype), row)
        for stacked, part in zip(jax.tree.leaves(buffers), jax.tree.leaves(row), strict=True):
            stacked[place.layer] = part
    assert buffers is not None
    if mesh is None:
        return jax.device_put(buffers)

    def divided(part: np.ndarray, at: Any) -> jax.Array:
        where = jax.sharding.NamedSharding(mesh, at)
        return jax.make_array_from_callback(part.shape, where, part.__getitem__)

    return jax.tree.map(divided, buffers, specs(leaf, buffers, mesh))


def quantized(x: np.ndarray, kind: str, *, reads: int, writes: int, group: int) -> QuantizedArray:
    """`quantize` on the CPU, whatever the devices are: a run knows its base by its codes, and GPUs
    divide in fewer steps, which can round a value between two codes to the other one.
    """
    with on_cpu():
        return _quantized(x, kind, reads=reads, writes=writes, group=group)


@partial(jax.jit, static_argnames=("kind", "reads", "writes", "group"))
def _quantized(x: np.ndarray, kind: str, *, reads: int, writes: int, group: int) -> QuantizedArray:
    """Compiled once for each shape."""
    return quantize(jnp.asarray(x), kind, reads=reads, writes=writes, group=group)


def whole_groups(place: Place, group: int) -> bool:
    """Whether no group of a tensor holds values of two heads."""
    return place.in_axes is None or place.shape[place.in_axes - 1] % group == 0


def native_blocks(blocks: QuantizedArray, place: Place) -> QuantizedArray:
    """The kernel [*in, *out] of codes and scales [out, in], whose groups run along the last axis,
    if `whole_groups` is true of its place; a table as it is.
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
