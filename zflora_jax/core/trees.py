"""Parameter trees by name: "a/b/c" paths, rules, comparison, stacking of layers, hashes. No
knowledge of any model.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

Tree = dict[str, Any]
References = list[weakref.ref[Any]]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, in sorted order of names."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`flatten`, with the arrays of a leaf that has several (codes and scales) under its name."""
    flat: dict[str, Any] = {}
    for name, leaf in flatten(tree).items():
        for path, part in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            flat["/".join((name, *(str(getattr(key, "name", key)) for key in path)))] = part
    return flat


def references(tree: Tree) -> References:
    """Weak references to the arrays of a tree."""
    return [weakref.ref(leaf) for leaf in jax.tree.leaves(tree)]


def refer_to(found: References, tree: Tree) -> bool:
    """True if `found` refers to the arrays of `tree`, none of which was replaced."""
    leaves = jax.tree.leaves(tree)
    return len(found) == len(leaves) and all(
        of() is leaf for of, leaf in zip(found, leaves, strict=True)
    )


def taken(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Yields (name, leaf) in order and removes each leaf from `tree`, so that its memory is free
    once the caller has dropped it.
    """
    for name in list(flatten(tree)):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node[parent]
        yield name, node.pop(last)


def map_with_names(fn: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """`fn(name, leaf)` at every leaf."""
    return unflatten({name: fn(name, leaf) for name, leaf in flatten(tree).items()})


def first_match(rules: Iterable[tuple[str, Any]], name: str) -> Any:
    """The value of the first rule whose regex matches the whole name; KeyError if none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise KeyError(f"no rule covers {name!r}")


def difference(expected: Iterable[str], given: Iterable[str], limit: int = 12) -> str:
    """A list of missing names, then of unexpected ones; "" if there are none."""
    want, have = set(expected), set(given)
    lines = [f"- missing    {name}" for name in sorted(want - have)]
    for name in sorted(have - want):
        close = difflib.get_close_matches(name, want - have, n=1)
        lines.append(f"+ unexpected {name}" + (f" (did you mean {close[0]}?)" if close else ""))
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join(lines[:limit] + more)


def check_like(
    given: Mapping[str, Any], expected: Mapping[str, Any], what: str, finite: bool = True
) -> None:
    """Raises ValueError naming a leaf of `given` that is missing, unexpected, misshapen or, if
    `finite`, not finite, compared with `expected` (arrays or ShapeDtypeStructs).
    """
    have, want = flatten(given), flatten(expected)
    if diff := difference(want, have):
        raise ValueError(f"{what} does not have the expected leaves:\n{diff}")
    for name, leaf in have.items():
        if tuple(leaf.shape) != tuple(want[name].shape):
            raise ValueError(
                f"{what}: {name} has shape {tuple(leaf.shape)}, expected {tuple(want[name].shape)}."
            )
    if finite and (wrong := _not_finite(have)):
        raise ValueError(f"{what}: {wrong} holds NaN or infinite values.")


def _not_finite(flat: Mapping[str, Any]) -> str | None:
    """The first of the arrays that holds NaN or infinite values."""
    finite = {name: np.isfinite(x).all() for name, x in flat.items() if isinstance(x, np.ndarray)}
    of_jax = {
        name: x
        for name, x in flat.items()
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    }
    if of_jax:  # one program for all of them: many small ones would cost more
        finite |= dict(zip(of_jax, gathered(_finite([*of_jax.values()])), strict=True))
    return next((name for name in flat if not finite.get(name, True)), None)


@jax.jit
def _finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def size(tree: Mapping[str, Any]) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


# --- layers: stacked on a leading axis ("layers/...") or one subtree each ("layers_0/...") --------


def unstack_layers(tree: Mapping[str, Any], num_layers: int) -> Tree:
    """{"layers": leaves [L, ...]} -> {"layers_0": leaves [...], ...}; another tree as it is."""
    if "layers" not in tree:
        return dict(tree)
    rest = {k: v for k, v in tree.items() if k != "layers"}
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
        for i in range(num_layers)
    }


def stack_layers(tree: Mapping[str, Any], num_layers: int) -> Tree:
    """The inverse of `unstack_layers`."""
    if "layers_0" not in tree:
        return dict(tree)
    rest = {k: v for k, v in tree.items() if not re.fullmatch(r"layers_\d+", k)}
    layers = (tree[f"layers_{i}"] for i in range(num_layers))
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def fingerprint(
    tree: Mapping[str, Any], corner: Mapping[str, tuple[int, ...]] | None = None
) -> str:
    """sha256 (hex) over names, shapes, dtypes and values; stacked and unstacked layers give the
    same. All processes that share arrays call it.

    corner: Leaf name -> number of leading entries per axis that count; None: all. The host holds
    one leaf of one layer at a time, or PIECE_BYTES of a larger table.
    """
    digests = {}
    for name, leaf in arrays(tree).items():
        stacked = name.startswith("layers/")
        cut = tuple(slice(size) for size in (leaf.shape if corner is None else corner[name]))
        for i in range(leaf.shape[0] if stacked else 1):
            part = re.sub(r"^layers/", f"layers_{i}/", name)
            shape = tuple(size.stop for size in cut[stacked:])
            digest = hashlib.sha256(f"{part} {shape} {leaf.dtype}".encode())
            if stacked or leaf.ndim == 0:
                digest.update(_bytes(on_host(leaf, i if stacked else None)[cut[stacked:]]))
            else:
                for rows in _pieces(leaf, shape[0]):
                    digest.update(_bytes(rows[:, *cut[1:]]))
            digests[part] = digest.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


PIECE_BYTES = 1 << 26  # of a vocabulary table that the host holds at one time


def _pieces(leaf: Any, rows: int) -> Iterator[np.ndarray]:
    """The first `rows` rows of an array, in pieces of at most PIECE_BYTES."""
    each = max(1, PIECE_BYTES * leaf.shape[0] // max(1, leaf.nbytes))
    if each >= rows or isinstance(leaf, np.ndarray):
        yield on_host(leaf)[:rows]
        return
    for start in range(0, rows, each):
        yield gathered(jax.lax.dynamic_slice_in_dim(leaf, start, min(each, rows - start)))


def _bytes(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value).view(np.uint8).data


def on_host(array: Any, row: int | None = None) -> np.ndarray:
    """`array`, or one row of its first axis, whole on the host, without a copy if a CPU device has
    it. All processes that hold a part of it must call this.
    """
    if isinstance(array, np.ndarray) or _is_on_host(array):
        whole = np.asarray(array)
        return whole if row is None else np.asarray(whole[row])
    # jax keeps the host's copy as long as its array lives: here a temporary one.
    return gathered(jnp.copy(array) if row is None else array[row])


def _is_on_host(array: Any) -> bool:
    """True if numpy sees the memory of `array` as it is; it does not for codes of 4 bits."""
    return (
        isinstance(array, jax.Array)
        and array.is_fully_addressable
        and jax.dtypes.itemsize_bits(array.dtype) >= 8
        and [device.platform for device in array.devices()] == ["cpu"]
    )


def gathered(array: Any) -> np.ndarray:
    """`array`, whole on the host. All processes that hold a part of it must call this."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
