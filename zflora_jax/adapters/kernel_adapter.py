"""The adapter of one kernel W: the products it adds, how its blocks start, and how they are fused
into W. `LowRank` is LoRA, `Tiled` FFA, `Widening` ffba and zFLoRA (docs/method.md; this project's
reconstruction).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zflora_jax.ops.copies import write_divided
from zflora_jax.ops.linear import column_norms, project, tile
from zflora_jax.ops.quantized import Write, cut, write_part

Array = jax.Array
Blocks = Mapping[str, Array]


class Base(NamedTuple):
    """The layer next to an adapter, as DoRA needs it."""

    kernel: Any  # W, float or quantised; None where it is packed
    bias: Array | None  # as y adds it
    dropped: bool  # whether some of the adapter's inputs have dropped out


@dataclass(frozen=True)
class KernelAdapter:
    """The adapter of one kernel W."""

    inputs: tuple[int, ...]  # axes of W
    outputs: tuple[int, ...]
    scale: float  # s = alpha / rank
    dropout: float = field(default=0.0, kw_only=True)  # share of the inputs, in a training step
    random: ClassVar[tuple[str, ...]] = ()  # blocks that start at random; others start at zero

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the blocks in one layer."""
        raise NotImplementedError

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        """Returns y = x W [B, T, *outputs] plus the adapter's products, and the output's adapter
        channels or None. blocks: One layer's; x: Base channels of the input [B, T, *inputs], after
        dropout; z: Its adapter channels [B, T, *inputs with the extra width], or None.
        """
        raise NotImplementedError

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        """Returns W with the blocks built in. W has the fused model's width, stacked or not."""
        raise NotImplementedError


# Block -> whether it reads, and whether it writes, adapter channels.
_BLOCKS = {"forward": (False, True), "backward": (True, False), "cross": (True, True)}


@dataclass(frozen=True)
class Widening(KernelAdapter):
    """y = x W + s z B and y_z = x A + z C: a wider kernel [[W, A], [s B, C]] of forward A, backward
    B and cross C.
    """

    extra_in: int  # adapter channels of the input stream
    extra_out: int
    starts: bool = True  # forward at random; not in q, whose added scores start at zero

    @property
    def random(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("forward",) if self.starts else ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        reads = self.inputs, (*self.inputs[:-1], self.extra_in)
        writes = self.outputs, (*self.outputs[:-1], self.extra_out)
        every = {name: reads[z_in] + writes[z_out] for name, (z_in, z_out) in _BLOCKS.items()}
        return {name: shape for name, shape in every.items() if math.prod(shape)}

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        n = len(self.inputs)
        y_z = project(x, blocks["forward"], n) if "forward" in blocks else None
        if z is not None and "backward" in blocks:
            y = y + self.scale * project(z, blocks["backward"], n)
        if z is not None and y_z is not None and "cross" in blocks:
            y_z = y_z + project(z, blocks["cross"], n)
        return y, y_z

    @property
    def axis(self) -> int:
        """The kernel's last input axis, negative."""
        return -len(self.outputs) - 1

    def spans(self, block: str) -> tuple[slice, slice]:
        """The inputs (along `axis`) and outputs (the last axis) of a block in the wide kernel."""
        widths = zip(_BLOCKS[block], (self.inputs[-1], self.outputs[-1]), strict=True)
        reads, writes = (slice(n, None) if extra else slice(0, n) for extra, n in widths)
        return reads, writes

    def stored(self, name: str, block: Array) -> Array:
        """A block as the wide kernel stores it: backward times s."""
        return block * self.scale if name == "backward" else block

    def fuse(self, kernel: Any, blocks: Blocks, write: Write = write_divided) -> Any:
        for name, block in blocks.items():
            values = self.stored(name, block)
            kernel = write_part(kernel, values, self.axis, *self.spans(name), write)
        return kernel

    def unfuse(self, kernel: Any) -> dict[str, Array]:
        """The blocks of a wide kernel, float32."""
        parts = {name: cut(kernel, self.axis, *self.spans(name)) for name in self.shapes}
        found = {name: part.astype(jnp.float32) for name, part in parts.items()}
        if "backward" in found:
            found["backward"] = found["backward"] / self.scale
        return found


@dataclass(frozen=True)
class LowRank(KernelAdapter):
    """LoRA: y = x W + s (x A) B, over flattened axes; rank: r."""

    rank: int
    random: ClassVar[tuple[str, ...]] = ("lora_a",)
    fuses_codes: ClassVar[bool] = False  # whether `fuse` takes a quantised kernel, too

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "lora_a": (math.prod(self.inputs), self.rank),
            "lora_b": (self.rank, math.prod(self.outputs)),
        }

    def added(self, blocks: Blocks, x: Array) -> Array:
        """s (x A) B of x [B, T, in], in x's dtype."""
        low = checkpoint_name(project(x, blocks["lora_a"]), "low rank")
        return self.scale * project(low, blocks["lora_b"])

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        return y + self.added(blocks, self.flat(x)).reshape(y.shape), None

    def flat(self, x: Array) -> Array:
        """x [B, T, *inputs] as [B, T, in]."""
        return x.reshape(*x.shape[: -len(self.inputs)], -1)

    def delta(self, blocks: Blocks) -> Array:
        """s A B, float32 [*layers, in, out]."""
        return self.scale * jnp.matmul(blocks["lora_a"], blocks["lora_b"], precision="highest")

    def sum(self, kernel: Array, blocks: Blocks) -> Array:
        """W + s A B, float32 [*layers, in, out]."""
        delta = self.delta(blocks)
        return kernel.astype(jnp.float32).reshape(delta.shape) + delta

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        return self.sum(kernel, blocks).reshape(kernel.shape).astype(kernel.dtype)


@dataclass(frozen=True)
class Tiled(LowRank):
    """FFA: `LowRank` whose B is a fixed tiling (`ops.linear.tile`); A starts at zero."""

    random: ClassVar[tuple[str, ...]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"ffa_a": (math.prod(self.inputs), self.rank)}

    def added(self, blocks: Blocks, x: Array) -> Array:
        return self.scale * tile(project(x, blocks["ffa_a"]), math.prod(self.outputs))

    def delta(self, blocks: Blocks) -> Array:
        return self.scale * tile(blocks["ffa_a"], math.prod(self.outputs))


@dataclass(frozen=True)
class DoRA(LowRank):
    """DoRA (arXiv 2402.09353): y = x V, where V is W + s A B with every column divided by its norm
    and multiplied by the trained `magnitude`, which starts as the norm of W's column.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().shapes, "magnitude": (math.prod(self.outputs),)}

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        x = self.flat(x)
        added = self.added(blocks, x)
        matrix = self.matrix(base.kernel)
        own = (y if base.bias is None else y - base.bias).reshape(added.shape)
        if base.dropped:
            own = project(x, matrix.astype(y.dtype))
        norms = column_norms(matrix, blocks["lora_a"], blocks["lora_b"], self.scale)
        norms = jax.lax.stop_gradient(norms)  # as in the paper's section 4.3
        some = norms > 0  # in the divisor too: the gradient of 0 / 0 is NaN even if not chosen
        magnitude = blocks["magnitude"].astype(jnp.float32)
        ratio = jnp.where(some, magnitude / jnp.where(some, norms, 1.0), 1.0)
        # = ratio (own + added) - own, in float32: the ratio's gradient is a sum over all tokens.
        adapted = (own + added).astype(jnp.float32)
        more = added + ((ratio.reshape(1, 1, -1) - 1) * adapted).astype(y.dtype)
        return y + more.reshape(y.shape), None

    def matrix(self, kernel: Any) -> Array:
        """W of one layer, float32 [in, out]."""
        return kernel.astype(jnp.float32).reshape(math.prod(self.inputs), -1)

    def start(self, kernel: Any) -> Array:
        """The first magnitudes [out] of a kernel of one layer, float32."""
        return jnp.linalg.norm(self.matrix(kernel), axis=0)

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        wide = self.sum(kernel, blocks)
        norms = jnp.linalg.norm(wide, axis=-2, keepdims=True)
        ratio = blocks["magnitude"][..., None, :] / norms
        wide = wide * jnp.where(norms > 0, ratio, 1.0)
        return wide.reshape(kernel.shape).astype(kernel.dtype)
