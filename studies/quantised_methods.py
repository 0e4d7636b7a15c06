"""Adapters that other work puts into a quantised base, for `zf.add_method`.

A kernel's weights are d c + m: a code c, the scale
d and the minimum m (if the type has one) of its group of inputs. Each method trains next to the
codes and is fused without rounding them; the bytes and kernels of a token are the base's.

The papers' equations, in code of this project: QA-LoRA (arXiv 2309.14717), PEQA (2305.14152) and
LoRA through the rounding (LR-QAT, 2406.06385).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import zflora_jax as zf

Array = jax.Array
GROUP = 32  # inputs of a group of Q4_1


@dataclasses.dataclass(frozen=True)
class QALoRA(zf.LowRank):
    """QA-LoRA: LoRA that reads the sum of each group's inputs, so that its weights are equal within
    a group: they are added to the group's minimum.
    """

    fuses_codes: ClassVar[bool] = True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        (inputs, rank), b = super().shapes.values()
        return {"lora_a": (inputs // GROUP, rank), "lora_b": b}

    def flat(self, x: Array) -> Array:
        x = super().flat(x)
        return x.reshape(*x.shape[:-1], -1, GROUP).sum(-1)

    def fuse(self, kernel: Any, blocks: Any) -> Any:
        mins = kernel.mins.astype(jnp.float32) + self.delta(blocks).reshape(kernel.mins.shape)
        return dataclasses.replace(kernel, mins=mins.astype(kernel.mins.dtype))


@dataclasses.dataclass(frozen=True)
class Moved(zf.LowRank):
    """A method that computes with another kernel, `moved`, in place of adding to the base's."""

    fuses_codes: ClassVar[bool] = True

    def moved(self, kernel: Any, blocks: Any) -> Any:
        """The kernel, stacked or not, that training computes with; float32 parts."""
        raise NotImplementedError

    def __call__(
        self, blocks: Any, x: Array, z: Array | None, y: Array, base: Any
    ) -> tuple[Array, Array | None]:
        kernel = self.moved(base.kernel, blocks).astype(jnp.float32)
        y = zf.project(x, kernel, len(self.inputs))
        return y if base.bias is None else y + base.bias, None

    def fuse(self, kernel: Any, blocks: Any) -> Any:
        moved = self.moved(kernel, blocks)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, kernel)


@dataclasses.dataclass(frozen=True)
class Scales(Moved):
    """PEQA: the scales are trained, d (1 + t)."""

    parts: ClassVar[int] = 1
    random: ClassVar[tuple[str, ...]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        (inputs, _), (_, outputs) = super().shapes.values()
        return {"lora_b": (self.parts * inputs // GROUP, outputs)}

    def moved(self, kernel: Any, blocks: Any) -> Any:
        scales = kernel.scales.astype(jnp.float32)
        t = [x.reshape(scales.shape) for x in jnp.split(blocks["lora_b"], self.parts, axis=-2)]
        found = dataclasses.replace(kernel, scales=scales * (1 + t[0]))
        if self.parts == 1:
            return found
        return dataclasses.replace(found, mins=kernel.mins.astype(jnp.float32) + scales * t[1])


@dataclasses.dataclass(frozen=True)
class ScalesAndMinima(Scales):
    """The scales and the minima are trained, d (1 + t) and m + d u."""

    parts: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True)
class ThroughRounding(Moved):
    """LoRA through the rounding: training computes with W + s A B quantised again by `requantised`,
    as it is deployed, and the gradient passes the rounding as it is (straight-through).
    """

    def moved(self, kernel: Any, blocks: Any) -> Any:
        delta = self.delta(blocks).reshape(kernel.codes.shape)
        return requantised(kernel.astype(jnp.float32) + delta, kernel)

    def __call__(
        self, blocks: Any, x: Array, z: Array | None, y: Array, base: Any
    ) -> tuple[Array, Array | None]:
        frozen = jax.lax.stop_gradient(self.moved(base.kernel, blocks).astype(jnp.float32))
        delta = self.delta(blocks).reshape(frozen.shape)  # whose gradient passes
        kernel = frozen + delta - jax.lax.stop_gradient(delta)
        y = zf.project(x, kernel, len(self.inputs))
        return y if base.bias is None else y + base.bias, None


def requantised(weights: Array, like: Any) -> Any:
    """Weights as Q4_1 or int4 stores them by rounding, in the groups of the kernel `like`."""
    axis = weights.ndim + like.axis
    groups = weights.reshape(*weights.shape[:axis], -1, like.group, *weights.shape[axis + 1 :])
    least = jnp.min(groups, axis + 1)
    if like.mins is None:
        scales, mins, low, high = jnp.max(jnp.abs(groups), axis + 1) / 7, None, -7, 7
    else:
        scales, low, high = (jnp.max(groups, axis + 1) - least) / 15, 0, 15
        mins, groups = least, groups - jnp.expand_dims(least, axis + 1)
    step = jnp.expand_dims(jnp.where(scales == 0, 1, scales), axis + 1)
    codes = jnp.clip(jnp.floor(groups / step + 0.5), low, high).reshape(weights.shape)
    half = jnp.bfloat16 if mins is None else jnp.float16
    scales, mins = (x if x is None else x.astype(half).astype(jnp.float32) for x in (scales, mins))
    return dataclasses.replace(like, codes=codes, scales=scales, mins=mins)


METHODS = {
    "qa-lora": QALoRA,
    "scales": Scales,
    "scales-minima": ScalesAndMinima,
    "lora-through-rounding": ThroughRounding,
}
