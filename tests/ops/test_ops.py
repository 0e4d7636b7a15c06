"""Every operation that is written for a compiler or a device equals the plain one: its values and,
where it is differentiated, its gradients; what XLA's CPU compiler makes of bfloat16.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import compiled
from support.grids import always
from support.models import narrow_and_wide

from zflora_jax import pack_for_decode, preset
from zflora_jax.core import trees
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.ops import copies, linear
from zflora_jax.ops.copies import take_rows, write_divided, write_pieces, write_slice
from zflora_jax.ops.linear import matmul, project
from zflora_jax.ops.rope import ROPE_ROWS, apply_rope, paired_order, plain_rope_tables, rope_tables

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


@pytest.mark.parametrize("widths", [(5, 9), (9, 5)], ids=str)
def test_products_of_trained_kernels(widths: tuple[int, int]) -> None:
    assert_same(matmul, jnp.matmul, draw((2, 3, widths[0]), widths), 1e-5)
    x, block = draw((2, 3, 4, widths[0]), (4, widths[0], widths[1], 2))
    assert_same(partial(project, axes=2), partial(jnp.tensordot, axes=2), [x, block], 2e-5)


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
    fast, plain = (lambda *a, f=f: f(*a, tied) for f in (linear.head_logits, linear.plain_logits))
    assert_same(fast, plain, given, 1e-5)
    halves = (x.astype(jnp.bfloat16) for x in given)
    narrow = jax.grad(lambda *a: jnp.sum(fast(*a)), (0, 1))(*halves)
    assert {x.dtype for x in narrow} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-3.2-1b"])
def test_rotations(model: str) -> None:
    """Looked up and computed; the former computes no angle in a program."""
    config = preset(model)
    positions = jnp.asarray([[0, 1, 2, 257, 5000, ROPE_ROWS - 1]], jnp.int32)
    plain = plain_rope_tables(config, positions)
    for length in (ROPE_ROWS, ROPE_ROWS + 1):
        for got, want in zip(rope_tables(config, positions, length), plain, strict=True):
            assert got.shape == (1, 6, 1, config.base_head_width // 2) and got.dtype == jnp.float32
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
    tiling = (np.arange(12) % rank == np.arange(rank)[:, None]) * np.float32(np.sqrt(rank / 12))
    assert_same(lambda h: linear.tile(h, 12), lambda h: h @ tiling, draw((2, 3, rank)), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_copies(dtype: Any) -> None:
    """Bit for bit: rows, slices at a number and a traced one, pieces, parts of divided kernels."""
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


# --- packed kernels and moves by bits -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("outputs", [10, 11])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_row_products_of_one_row_and_of_several(
    shape: tuple[int, int], outputs: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers: every sum is exact, whatever its order. Of small kernels and of large ones,
    each row under vmap, and as GPUs and TPUs do it.
    """
    rng = np.random.default_rng(0)
    x, kernel = rng.integers(-4, 5, (*shape, 24)), rng.integers(-4, 5, (outputs, 24))
    given = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    for limit in (linear.SMALL, 0):
        monkeypatch.setattr(linear, "SMALL", limit)
        np.testing.assert_array_equal(
            jax.jit(lambda x, w: linear.packed_linear(x, w, jnp.float32))(*given), x @ kernel.T
        )
        by_row = jax.vmap(lambda row: linear.packed_linear(row[None], given[1], jnp.float32)[0])(
            given[0]
        )
        np.testing.assert_array_equal(by_row, x @ kernel.T)
    np.testing.assert_array_equal(linear.plain_product(*given, jnp.float32), x @ kernel.T)
    for product, w in ((linear.plain_product, given[1]), (linear.column_product, given[1].T)):
        eight = linear.product_of_eight_rows(given[0], w, jnp.float32, product)
        np.testing.assert_array_equal(eight, x @ kernel.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_move_places_every_bit_and_passes_its_gradient_on(dtype: Any) -> None:
    """Also NaN, the sign of zero, under vmap; the gradient of rows taken twice is their sum."""
    table = jnp.asarray([[1.5, -0.0], [jnp.nan, jnp.inf], [3.0, 1e-40]], dtype)
    rows = jnp.asarray([2, 0, 2, -2, 7])

    def taken(table: Any, rows: Any) -> Any:
        return copies.copy_bits(lambda x, at: jnp.take(x, at, axis=0), (table,), (rows,))

    bits = {2: jnp.uint16, 4: jnp.uint32}[table.dtype.itemsize]
    want = np.asarray(jnp.take(table, rows, axis=0))
    by_row = jax.vmap(taken, (None, 0))(table, rows[:, None])[:, 0]
    for got in (np.asarray(jax.jit(taken)(table, rows)), np.asarray(by_row)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got[:4].view(bits), want[:4].view(bits))
        assert np.isnan(got[4].astype(np.float32)).all(), "a row that does not exist"

    def written(cache: Any, new: Any) -> Any:
        return copies.write_slice(cache, new, jnp.int32(1), 0)

    weights = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype)
    for function, given, gradients in (
        (lambda x: taken(x, rows[:3]), (table.at[1].set(0),), [[[3, 4], [0, 0], [6, 8]]]),
        (written, (weights, weights[:1]), [[[1, 2], [0, 0], [5, 6]], [[3, 4]]]),
    ):
        places = tuple(range(len(given)))
        weighted = lambda *x, f=function: jnp.sum(f(*x) * weights).astype(jnp.float32)  # noqa: E731
        for got, wanted in zip(jax.grad(weighted, places)(*given), gradients, strict=True):
            np.testing.assert_array_equal(got.astype(jnp.float32), wanted)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's CPU compiler")
@pytest.mark.parametrize(
    ("batch", "tied"),
    always([(b, t) for b in (1, 2) for t in (True, False)], lambda case: case == (1, True)),
)
def test_a_bfloat16_program_makes_no_float32_copy_of_kernels_table_or_cache(
    batch: int, tied: bool, request: pytest.FixtureRequest
) -> None:
    """Read off the HLO, fused computations aside: such copies take more memory than the model and,
    made at every call, more time than prefill.
    """
    widths = {"hidden_size": 96, "intermediate_size": 224, "vocab_size": 1000}
    model = pack_for_decode(narrow_and_wide(**widths, tie_word_embeddings=tied)[0])
    tokens, keys = jnp.ones((batch, 10), jnp.int32), jax.random.split(jax.random.key(0), batch)
    request.getfixturevalue("optimised")  # for this program alone
    program, variables = DecodeProgram(model.config), {"params": model.params}
    lowered = DecodeProgram.decode.lower(program, variables, tokens, tokens > 0, keys, 8)
    text = compiled(lowered).as_text()
    made = [b for b in text.split("\n}\n") if not re.match(r"%?(fused|wrapped|para)", b.strip())]

    def sizes(pattern: str, text: str) -> list[int]:
        return [math.prod(map(int, dims.split(","))) for dims in re.findall(pattern, text)]

    arrays = sizes(r"= f32\[([\d,]+)\]\S* (?!parameter)", "\n".join(made))
    cells = batch * model.config.num_kv_heads * model.config.head_dim * 64
    kernels = {x.size for x in trees.flatten(model.params).values() if x.ndim == 2}
    assert arrays and not set(arrays) & {cells, *kernels}
    update = r"= {}\[([\d,]+)\]\S* dynamic-update-slice\("
    assert cells in sizes(update.format("u16"), text)
    assert cells not in sizes(update.format("(?!u16)\\w+"), text)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1)], ids=str)
def test_bfloat16_products_are_added_up_in_float32_and_rounded_once(shape: tuple[int, int]) -> None:
    """256 + 1 is no bfloat16: a sum kept in bfloat16 would lose every 1."""
    x, kernel = jnp.ones((*shape, 40), jnp.bfloat16), jnp.ones((6, 40), jnp.bfloat16)
    kernel = kernel.at[:, 0].set(256)
    got = linear.packed_linear(x, kernel)
    assert got.dtype == jnp.bfloat16 and (got == jnp.bfloat16(256 + 39)).all()
    assert (linear.packed_linear(x, kernel, jnp.float32) == 256 + 39).all()
