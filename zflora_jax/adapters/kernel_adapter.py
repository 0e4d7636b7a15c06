"""What an adapter puts next to one kernel W: the products it adds, where its blocks start, and how
they are fused into W. `LowRank` is LoRA, `Tiled` FFA, `Widening` ffba and zFLoRA; DoRA is in
`adapters.dora`. Their construction is this project's reconstruction, see docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from zflora_jax.ops.copies import write_divided
from zflora_jax.ops.linear import project
from zflora_jax.ops.quantized_blocks import Write, read_part, write_part
from zflora_jax.ops.remat import save_for_backward
from zflora_jax.ops.tiling import tile

Array = jax.Array
Blocks = Mapping[str, Array]


class Base(NamedTuple):
    """What an adapter may read of the layer next to it.

    Attributes:
      kernel: W, float or quantised; None where it is packed.
      bias: The bias as y adds it, or None.
      dropped: Whether some of the adapter's inputs have dropped out.
    """

    kernel: Any = None
    bias: Array | None = None
    dropped: bool = False


@dataclass(frozen=True)
class KernelAdapter:
    """The adapter of one kernel.

    Attributes:
      inputs: Input axes of W.
      outputs: Output axes of W.
      scale: s = alpha / rank.
      random: Blocks that start at random; the others start at zero.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: float
    random: ClassVar[tuple[str, ...]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the blocks in one layer."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Share of the inputs that a training step drops."""
        return 0.0

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        """Adds the adapter's products.

        Args:
          blocks: The blocks of one layer.
          x: Base channels of the input [B, T, *inputs], after dropout.
          z: Adapter channels of the input [B, T, *inputs with the extra width], or None.
          y: x W [B, T, *outputs].
          base: The layer that the adapter is next to.

        Returns:
          y, and the adapter channels of the output or None.
        """
        raise NotImplementedError

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        """W, stacked or not, already as wide as the fused model's, with the blocks built in."""
        raise NotImplementedError


# Block -> whether it reads, and whether it writes, adapter channels.
BLOCKS = {"forward": (False, True), "backward": (True, False), "cross": (True, True)}


@dataclass(frozen=True)
class Widening(KernelAdapter):
    """y = x W + s z B and y_z = x A + z C: a wider kernel [[W, A], [s B, C]] of forward A, backward
    B and cross C.

    Attributes:
      extra_in: Adapter channels of the input stream.
      extra_out: Adapter channels of the output stream.
      starts: Whether forward starts at random (not in q, so that added scores start at zero).
    """

    extra_in: int
    extra_out: int
    starts: bool = True

    @property
    def random(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("forward",) if self.starts else ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        z_in = (*self.inputs[:-1], self.extra_in)
        z_out = (*self.outputs[:-1], self.extra_out)
        every = {
            "forward": self.inputs + z_out,
            "backward": z_in + self.outputs,
            "cross": z_in + z_out,
        }
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
        """The inputs and outputs of a block in the wide kernel, along `axis` and the last axis:
        forward is top right, backward bottom left, cross bottom right.
        """
        widths = zip(BLOCKS[block], (self.inputs[-1], self.outputs[-1]), strict=True)
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
        found = {name: read_part(kernel, self.axis, *self.spans(name)) for name in self.shapes}
        if "backward" in found:
            found["backward"] = found["backward"] / self.scale
        return found


@dataclass(frozen=True)
class LowRank(KernelAdapter):
    """LoRA: y = x W + s (x A) B, over flattened axes.

    Attributes:
      rank: r.
      share: Share of x that drops out in training.
    """

    rank: int
    share: float = 0.0
    random: ClassVar[tuple[str, ...]] = ("lora_a",)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "lora_a": (math.prod(self.inputs), self.rank),
            "lora_b": (self.rank, math.prod(self.outputs)),
        }

    @property
    def dropout(self) -> float:
        return self.share

    def added(self, blocks: Blocks, x: Array) -> Array:
        """s (x A) B of x [B, T, in], in x's dtype."""
        low = save_for_backward(project(x, blocks["lora_a"]), "low rank")
        return self.scale * project(low, blocks["lora_b"])

    def __call__(
        self, blocks: Blocks, x: Array, z: Array | None, y: Array, base: Base
    ) -> tuple[Array, Array | None]:
        return y + self.added(blocks, self.flat(x)).reshape(y.shape), None

    def flat(self, x: Array) -> Array:
        """x [B, T, *inputs] as [B, T, in]."""
        return x.reshape(*x.shape[: -len(self.inputs)], -1)

    def sum(self, kernel: Array, blocks: Blocks) -> Array:
        """W + s A B, float32 [*layers, in, out]."""
        product = partial(jnp.matmul, precision="highest")
        delta = self.scale * product(blocks["lora_a"], blocks["lora_b"])
        return kernel.astype(jnp.float32).reshape(delta.shape) + delta

    def fuse(self, kernel: Any, blocks: Blocks) -> Any:
        return self.sum(kernel, blocks).reshape(kernel.shape).astype(kernel.dtype)


@dataclass(frozen=True)
class Tiled(LowRank):
    """FFA: `LowRank` whose B is a fixed tiling (`ops.tiling.tile`); A starts at zero."""

    random: ClassVar[tuple[str, ...]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"ffa_a": (math.prod(self.inputs), self.rank)}

    def added(self, blocks: Blocks, x: Array) -> Array:
        return self.scale * tile(project(x, blocks["ffa_a"]), math.prod(self.outputs))

    def sum(self, kernel: Array, blocks: Blocks) -> Array:
        delta = self.scale * tile(blocks["ffa_a"], math.prod(self.outputs))
        return kernel.astype(jnp.float32).reshape(delta.shape) + delta
