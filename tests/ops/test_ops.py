"""Every operation that is written for a compiler or a device equals the plain one beside it: its
values and, where it is differentiated, its gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zflora_jax.core.presets import preset
from zflora_jax.ops.copies import take_rows, write_divided, write_pieces, write_slice
from zflora_jax.ops.linear import (
    column_product,
    head_logits,
    matmul,
    plain_logits,
    plain_product,
    plain_tile,
    product_of_eight_rows,
    project,
    tile,
)
from zflora_jax.ops.rope import (
    ROPE_ROWS,
    apply_rope,
    paired_order,
    plain_rope_tables,
    rope_tables,
)

Function = Callable[..., Any]


def draw(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_same(fast: Function, plain: Function, given: list[jax.Array], tolerance: float) -> None:
    """Values, and the gradients of all that is given with a weight on each value."""
    want = plain(*given)
    np.testing.assert_allclose(jax.jit(fast)(*given), want, atol=tolerance)
    (weights,) = draw(want.shape)

    def gradients(f: Function) -> Any:
        places = tuple(range(len(given)))
        return jax.grad(lambda *given: jnp.sum(f(*given) * weights), places)(*given)

    for got, expected in zip(gradients(fast), gradients(plain), strict=True):
        np.testing.assert_allclose(got, expected, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)], ids=str)
def test_products_of_eight_rows(shape: tuple[int, int]) -> None:
    x, kernel = draw((*shape, 12), (11, 12))
    for product, given in ((plain_product, kernel), (column_product, kernel.T)):
        got = product_of_eight_rows(x, given, product=product)
        np.testing.assert_allclose(got, plain_product(x, kernel), atol=1e-5)


@pytest.mark.parametrize("widths", [(5, 9), (9, 5)], ids=str)
def test_products_of_trained_kernels(widths: tuple[int, int]) -> None:
    assert_same(matmul, jnp.matmul, draw((2, 3, widths[0]), widths), 1e-5)
    x, block = draw((2, 3, 4, widths[0]), (4, widths[0], widths[1], 2))
    assert_same(
        lambda x, block: project(x, block, 2),
        lambda x, block: jnp.tensordot(x, block, 2),
        [x, block],
        2e-5,
    )


@pytest.mark.parametrize("widths", [(8, 64), (64, 8)], ids=str)
def test_gradients_of_float32_kernels_beside_bfloat16_are_sums_in_float32(
    widths: tuple[int, int],
) -> None:
    """Of rows, and of devices: the products of rounded operands, added up unrounded."""
    x, w = draw((4, 64, widths[0]), widths)
    x, (weights,) = x.astype(jnp.bfloat16), draw((4, 64, widths[1]))
    weights = weights.astype(jnp.bfloat16)

    def loss(f: Function, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum((f(x, w) * weights).astype(jnp.float32))

    y = matmul(x, w)
    dx, dw = jax.grad(loss, (1, 2))(matmul, x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    want = jnp.einsum("BTi,BTj->ij", *(a.astype(jnp.float32) for a in (x, weights)))
    np.testing.assert_allclose(dw, want, atol=1e-5 * float(jnp.abs(want).max()))
    assert np.abs(want - want.astype(jnp.bfloat16).astype(jnp.float32)).max() > 1e-3
    np.testing.assert_array_equal(y, jnp.matmul(x, w.astype(jnp.bfloat16)))


@pytest.mark.parametrize("length", [1, 3], ids=["one token a row", "sequences"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head(tied: bool, length: int) -> None:
    given = draw((2, length, 8), (50, 8) if tied else (8, 50))
    assert_same(
        lambda x, kernel: head_logits(x, kernel, tied),
        lambda x, kernel: plain_logits(x, kernel, tied),
        given,
        1e-5,
    )
    narrow = jax.grad(lambda x, kernel: jnp.sum(head_logits(x, kernel, tied)), (0, 1))(
        *(x.astype(jnp.bfloat16) for x in given)
    )
    assert {x.dtype for x in narrow} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.2-1b"])
def test_rotations(model: str) -> None:
    """Looked up and computed; the former computes no angle in a program."""
    config = preset(model)
    positions = jnp.asarray([[0, 1, 2, 257, 5000, ROPE_ROWS - 1]], jnp.int32)
    plain = plain_rope_tables(config, positions)
    for length in (ROPE_ROWS, ROPE_ROWS + 1):
        for got, want in zip(rope_tables(config, positions, length), plain, strict=True):
            assert got.shape == (1, 6, 1, config.rotary_dim // 2) and got.dtype == jnp.float32
            np.testing.assert_allclose(got, want, atol=2e-7)
    computed = [
        "cos" in str(jax.make_jaxpr(lambda p, n=n: rope_tables(config, p, n))(positions))
        for n in (ROPE_ROWS, ROPE_ROWS + 1)
    ]
    assert computed == [False, True]


def test_a_paired_head_is_turned_whole() -> None:
    """As its base dims alone are turned, the others not at all."""
    base = preset("tiny")
    wide = base.replace(head_dim=22, base_head_dim=16)
    order = paired_order(16, 22)
    assert sorted(order) == list(range(22)) and list(paired_order(16, 16)) == list(range(16))
    positions, (x,) = jnp.asarray([[0, 3, 300]], jnp.int32), draw((1, 3, 2, 22))
    want = apply_rope(x, *rope_tables(wide, positions, 512))
    for length in (512, ROPE_ROWS + 1):
        cos, sin = rope_tables(wide.replace(packed=True), positions, length)
        got = apply_rope(x[..., order], cos, sin)[..., np.argsort(order)]
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_array_equal(got[..., 16:], x[..., 16:])


@pytest.mark.parametrize("rank", [4, 5])
def test_the_tiling_of_ffa(rank: int) -> None:
    assert_same(lambda h: tile(h, 12), lambda h: plain_tile(h, 12), draw((2, 3, rank)), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_copies(dtype: Any) -> None:
    """Bit for bit: rows taken, a slice at a number and at a traced one, pieces, a part of a divided
    kernel.
    """
    x, update, rows = *draw((6, 5, 8), (6, 2, 8), dtype=dtype), jnp.asarray([4, 0, 4])
    pieces, starts = [x[:2, :1, :3], x[:1, :2, :8]], [(1, 2, 4), (4, 3, 0)]
    pairs = [
        (jax.jit(take_rows)(x[:, 0], rows), x[rows, 0]),
        (take_rows(x[:, 0], rows, 10), jnp.pad(x[rows, 0], ((0, 0), (0, 2)))),
        (take_rows(x[:, 0], jnp.asarray([6, -1]), 10), jnp.full((2, 10), jnp.nan)),
        (write_slice(x, update, 3, 1), x.at[:, 3:].set(update)),
        (jax.jit(write_slice, static_argnums=3)(x, update, 1, -2), x.at[:, 1:3].set(update)),
        (
            jax.jit(lambda x, *pieces: write_pieces(x, pieces, starts))(x, *pieces),
            x.at[1:3, 2:3, 4:7].set(pieces[0]).at[4:5, 3:5].set(pieces[1]),
        ),
        (
            write_divided(x, x[:, :2, :3], {-2: slice(3, None), -1: slice(0, 3)}),
            x.at[:, 3:, :3].set(x[:, :2, :3]),
        ),
    ]
    for got, want in pairs:
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
