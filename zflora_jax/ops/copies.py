"""Bitwise copies: elements picked from arrays and written into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def copy_bits(
    placed: Callable[..., Array], arrays: tuple[Array, ...], at: tuple[Array, ...] = ()
) -> Array:
    """placed(*arrays, *at), computed on a CPU with the bits of bfloat16 arrays. `placed` must only
    pick or place elements of `arrays`, of one dtype, or zeros, at integer positions `at`.
    """
    # XLA's CPU compiler would convert all of `arrays` to float32 and back
    # (test_a_bfloat16_program_makes_no_float32_copy_of_kernels_table_or_cache). Unsigned bits:
    # `jnp.take` gives the largest integer, a NaN, for a position that is not there.
    if arrays[0].dtype != jnp.bfloat16:
        return placed(*arrays, *at)

    def by_bits(*given: Array) -> Array:
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in given[: len(arrays)])
        return jax.lax.bitcast_convert_type(placed(*bits, *given[len(arrays) :]), jnp.bfloat16)

    return jax.lax.platform_dependent(*arrays, *at, cpu=by_bits, default=placed)


@copy_bits.defjvp
def _copy_bits_jvp(
    placed: Callable[..., Array], primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    arrays, at = primals
    return copy_bits(placed, arrays, at), placed(*tangents[0], *at)


def take_rows(table: Array, rows: Array, width: int | None = None) -> Array:
    """Rows of a table [n, d] -> [*rows, width], zeros from d on; NaN for a missing row."""
    # Missing rows are tested after the zeros: XLA's GPU compiler then fuses all of it.
    x = copy_bits(partial(jnp.take, axis=0, mode="clip"), (table,), (rows,))
    if width is not None and width > table.shape[1]:
        x = jnp.pad(x, [(0, 0)] * rows.ndim + [(0, width - table.shape[1])])
    exist = (rows >= 0) & (rows < len(table))
    return jnp.where(exist[..., None], x, jnp.nan)


def write_slice(x: Array, update: Array, start: Array | int, axis: int) -> Array:
    """`x` with `update` written from `start` on along `axis`."""
    place = partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
    if isinstance(start, int):
        return copy_bits(partial(place, start_index=start), (x, update))
    return copy_bits(place, (x, update), (start,))


def write_pieces(x: Array, pieces: Sequence[Array], starts: Sequence[tuple[int, ...]]) -> Array:
    """`x` with each of `pieces` written from its indices on."""

    # XLA does one update after the other in place, but copies x if a view of its heads is written
    # (test_a_swap_copies_no_kernel).
    def update(x: Array, *pieces: Array) -> Array:
        for piece, start in zip(pieces, starts, strict=True):
            x = jax.lax.dynamic_update_slice(x, piece, start)
        return x

    return copy_bits(update, (x, *(piece.astype(x.dtype) for piece in pieces)))


def write_divided(x: Array, value: Array, spans: Mapping[int, slice]) -> Array:
    """`x`, divided over devices, with `value` written in the spans {negative axis: span}."""
    # An elementwise choice is divided as x is: XLA would gather a divided array to write into a
    # part of it (test_no_program_holds_a_whole_kernel).
    pads, inside = [(0, 0)] * x.ndim, jnp.ones((1,) * x.ndim, bool)
    for axis, span in spans.items():
        start, stop, _ = span.indices(x.shape[axis])
        pads[axis] = start, x.shape[axis] - stop
        place = jnp.arange(x.shape[axis]).reshape(
            [-1 if at == x.ndim + axis else 1 for at in range(x.ndim)]
        )
        inside = inside & (place >= start) & (place < stop)
    return jnp.where(inside, jnp.pad(value.astype(x.dtype), pads), x)
