"""Ways to deploy a trained adapter on a quantised base. Each returns a model of float32 numbers
that are exactly those which the deployed weights stand for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import zflora_jax as zf
from studies.quantised_methods import METHODS

Array = jax.Array
Tree = Any
LENGTH = 256  # tokens of a calibration row


class Deployed(NamedTuple):
    """A deployed model: its numbers, and the bytes of its parameters as they are stored."""

    model: zf.Model
    nbytes: int


class Trained(NamedTuple):
    """A trained adapter and the base that it was trained next to."""

    run: zf.RunConfig
    base: zf.Model  # stored as codes; activations are float32
    adapters: Tree


Deployment = Callable[[Trained], Deployed]


def floats(model: zf.Model) -> zf.Model:
    """A model with its codes as float32 numbers."""
    return zf.dequantize_model(model, "float32")


def exact(trained: Trained) -> zf.Model:
    """What training computed: the adapter built in without rounding."""
    if trained.run.adapter.method not in METHODS:
        return _fused(floats(trained.base), trained)

    def wide(part: Array) -> Array:
        return part.astype(jnp.float32) if part.dtype in (jnp.float16, jnp.bfloat16) else part

    params = jax.tree.map(wide, trained.base.params)
    return floats(_fused(dataclasses.replace(trained.base, params=params), trained))


def unmerged(trained: Trained) -> Deployed:
    """The adapter next to the base's codes, in bfloat16 by its bytes and exact by its numbers."""
    return Deployed(exact(trained), nbytes(trained.base.params) + 2 * _size(trained.adapters))


def in_codes(trained: Trained) -> Deployed:
    """The adapter in the base's own codes: blocks of the same type, or its scales and minima."""
    fused = _fused(trained.base, trained)
    return Deployed(floats(fused), nbytes(fused.params))


def in_eight_bits(trained: Trained) -> Deployed:
    """The adapter's blocks in 8 bits, a scale for each group of 32 inputs, next to the codes."""

    def rounded(block: Array) -> Array:
        groups = jnp.pad(block, [(0, 0)] * (block.ndim - 2) + [(0, -block.shape[-2] % 32), (0, 0)])
        groups = groups.reshape(*block.shape[:-2], -1, 32, block.shape[-1])
        scale = jnp.max(jnp.abs(groups), axis=-2, keepdims=True) / 127
        codes = jnp.round(groups / jnp.where(scale == 0, 1, scale))
        scale = scale.astype(jnp.float16).astype(jnp.float32)
        flat = (codes * scale).reshape(*block.shape[:-2], -1, block.shape[-1])
        return flat[..., : block.shape[-2], :]

    model = exact(trained._replace(adapters=jax.tree.map(rounded, trained.adapters)))
    # A byte and a thirty-second of a half each.
    return Deployed(model, nbytes(trained.base.params) + _size(trained.adapters) * 17 // 16)


UNMERGED = (unmerged, in_eight_bits)  # their products are kernels of their own in every token


def in_bfloat16(trained: Trained) -> Deployed:
    """The adapter added to the base, and the sum stored in bfloat16."""
    codes = _codes(trained.base)

    def stored(name: str, kernel: Array) -> Array:
        return kernel.astype(jnp.bfloat16).astype(jnp.float32) if name in codes else kernel

    more = sum(2 * leaf.codes.size - leaf.nbytes for leaf in codes.values())
    model = _with_kernels(exact(trained), stored)
    return Deployed(model, nbytes(trained.base.params) + more)


def rounded(trained: Trained) -> Deployed:
    """The adapter added to the base, and the sum quantised again by rounding, in the base's type
    and groups.
    """
    like = next(iter(_codes(trained.base).values()))
    group = None if like.kind.startswith("q") else like.group
    model = zf.quantize_model(exact(trained), zf.QuantizeConfig(like.kind, group=group))
    return Deployed(floats(model), nbytes(trained.base.params))


def by_gptq(trained: Trained, rows: int = 64, same_grid: bool = False) -> Deployed:
    """The adapter added to the base, and the sum quantised by GPTQ (arXiv 2210.17323) on the first
    rows of the task's training data: the error of each input is moved to those that come after it.
    Hessians are of the merged model before any of it is quantised. A group's scale and minimum are
    the base's (same_grid), or taken as rounding takes them, when its first input is reached.
    """
    merged = exact(trained)
    inputs, like = grams(merged, _calibration(trained, merged, rows)), _codes(trained.base)

    def quantised(name: str, kernel: Array) -> Array:
        if name not in like:
            return kernel
        codes, hessians = like[name], np.asarray(inputs[name])
        shape = hessians.shape[:2]
        grids = [None] * len(hessians)
        if same_grid:
            step = dataclasses.replace(codes, codes=jnp.ones(codes.codes.shape), mins=None)
            zero = dataclasses.replace(codes, codes=jnp.zeros(codes.codes.shape))
            both = (np.asarray(w.astype(jnp.float32)).reshape(*shape, -1) for w in (step, zero))
            grids = list(zip(*both, strict=True))
        weights = np.asarray(kernel).reshape(*shape, -1)
        parts = zip(weights, hessians, grids, strict=True)
        made = [gptq(w, h, codes.kind, codes.group, grid=grid) for w, h, grid in parts]
        return jnp.asarray(np.stack(made)).reshape(kernel.shape)

    return Deployed(_with_kernels(merged, quantised), nbytes(trained.base.params))


def gptq(
    weights: np.ndarray,
    gram: np.ndarray,
    kind: str,
    group: int,
    damping: float = 0.01,
    grid: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """The numbers [in, out] that GPTQ's codes of weights [in, out] stand for. gram: X^T X of the
    kernel's inputs [in, in]; grid: the scale and the minimum of each weight, None to take them from
    the weights.
    """
    hessian = gram.astype(np.float64)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)  # upper
    left, found = weights.copy(), np.empty_like(weights)
    low, high = (-8, 7) if kind == "int4" else (0, 15)
    for start in range(0, len(left), group):
        span, errors = slice(start, start + group), np.empty((group, left.shape[1]), np.float32)
        scale, offset = _grid(left[span], kind) if grid is None else (x[start] for x in grid)
        step = np.where(scale == 0, 1, scale)
        for i in range(start, start + group):
            codes = np.clip(np.round((left[i] - offset) / step), low, high)
            found[i] = codes * scale + offset
            errors[i - start] = (left[i] - found[i]) / inverse[i, i]
            later = slice(i + 1, start + group)
            left[later] -= np.outer(inverse[i, later], errors[i - start])
        left[start + group :] -= inverse[span, start + group :].T @ errors
    return found


def _grid(weights: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the minimum [out] by which rounding stores a group of weights [inputs, out]."""

    def half(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float32)

    if kind == "q4_1":
        least = weights.min(0)
        return half((weights.max(0) - least) / 15), half(least)
    if kind == "int4":
        return np.abs(weights).max(0) / 7, np.zeros(weights.shape[1], np.float32)
    raise zf.ConfigError(f"GPTQ is here for q4_1 and int4, not for {kind}.")


# --- the inputs of kernels ------------------------------------------------------------------------


@jax.custom_vjp
def _watched(y: Array, x: Array, gram: Array) -> Array:
    """y; the gradient of `gram` is x^T x."""
    return y


def _watched_backward(x: Array, dy: Array) -> tuple[Array, Array, Array]:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return dy, jnp.zeros_like(x), rows.T @ rows


_watched.defvjp(lambda y, x, gram: (y, x), _watched_backward)


@dataclasses.dataclass(frozen=True)
class Gram(zf.LowRank):
    """Adds nothing; the gradient of its block is the Gram matrix of the kernel's inputs."""

    random: ClassVar[tuple[str, ...]] = ()
    delta = zf.LowRank.fuse  # never called

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs = super().shapes["lora_a"][0]
        return {"lora_a": (inputs, inputs)}

    def __call__(
        self, blocks: Any, x: Array, z: Array | None, y: Array, base: Any
    ) -> tuple[Array, Array | None]:
        return _watched(y, self.flat(x), blocks["lora_a"]), None


def grams(model: zf.Model, tokens: np.ndarray) -> dict[str, Array]:
    """Name of a kernel -> the Gram matrices [L, in, in] of its inputs. tokens: [B, T], one row at a
    time.
    """
    zf.add_method("gram", Gram)
    adapter = zf.AdapterConfig("gram", rank=1)
    llama = zf.Llama(model.config, adapter)
    start = jax.eval_shape(lambda: zf.init_adapters(jax.random.key(0), model, adapter))

    @jax.jit
    def of(total: Tree, tokens: Array) -> Tree:
        def read(adapters: Tree) -> Array:
            variables = {"params": model.params, "adapters": adapters}
            return llama.apply(variables, tokens, method="hidden")[0].sum()

        return jax.tree.map(jnp.add, total, jax.grad(read)(total))

    found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
    for row in tokens:
        found = of(found, row[None])
    return {name.replace("lora_a", "kernel"): leaf for name, leaf in _leaves(found)}


def _calibration(trained: Trained, model: zf.Model, rows: int) -> np.ndarray:
    """The first training rows as tokens [B, LENGTH], without padding, across rows."""
    texts = zf.held_out(zf.override(trained.run, {"eval.limit": rows}), model, "train").rows
    text = np.concatenate([row.tokens for row in texts])
    return text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)


def divergence(one: zf.Model, other: zf.Model, run: zf.RunConfig, rows: int = 100) -> float:
    """The mean over learned tokens of test rows of KL(one || other), in nats."""

    @jax.jit
    def nats(logits: Array, others: Array, mask: Array) -> Array:
        p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
        kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        return jnp.sum(kl[:, :-1], where=mask[:, 1:])

    total = count = 0.0
    for row in zf.held_out(zf.override(run, {"eval.limit": rows}), one, "test").rows:
        # Few lengths, few compilations; no learned token sees what is behind it.
        tokens, mask = (np.pad(x, (0, -len(x) % 64))[None] for x in (row.tokens, row.loss_mask))
        total += float(nats(zf.forward(one, tokens), zf.forward(other, tokens), mask))
        count += mask[:, 1:].sum()
    return total / count


def update_in_steps(base: zf.Model, merged: zf.Model) -> float | None:
    """The root mean square of the kernels' updates over that of the quantiser's steps; None where
    the merged model has other widths, and of nf4, whose steps differ. base: stored as codes.
    """
    new, moved, squares = dict(_leaves(merged.params)), 0.0, 0.0
    for name, kernel in _codes(base).items():
        if new[name].shape != kernel.shape or kernel.kind == "nf4":
            return None
        step = dataclasses.replace(kernel, codes=jnp.ones(kernel.codes.shape), mins=None)
        moved += float(jnp.sum(jnp.square(new[name] - kernel.astype(jnp.float32))))
        squares += float(jnp.sum(jnp.square(step.astype(jnp.float32))))
    return (moved / squares) ** 0.5


def nbytes(params: Tree) -> int:
    """Bytes of parameters as they are stored; codes of 4 bits share bytes."""
    return sum(leaf.nbytes for _, leaf in _leaves(params))


# --- leaves ---------------------------------------------------------------------------------------


def _fused(base: zf.Model, trained: Trained) -> zf.Model:
    return zf.fuse(base, trained.run.adapter, trained.adapters)


def _size(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a tree; codes with their scales are one leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "codes"))
    for path, leaf in found:
        yield "/".join(str(key.key) for key in path), leaf


def _codes(model: zf.Model) -> dict[str, Any]:
    """Name -> kernel of the layers that are stored as codes."""
    named = ((n, x) for n, x in _leaves(model.params) if n.startswith("layers"))
    return {name: leaf for name, leaf in named if hasattr(leaf, "codes")}


def _with_kernels(model: zf.Model, change: Callable[[str, Array], Array]) -> zf.Model:
    """A float model with `change(name, kernel)` in place of the kernels of its layers."""
    names = iter([name for name, _ in _leaves(model.params)])

    def visit(leaf: Array) -> Array:
        name = next(names)
        return change(name, leaf) if name.startswith("layers") and name.endswith("kernel") else leaf

    return dataclasses.replace(model, params=jax.tree.map(visit, model.params))
