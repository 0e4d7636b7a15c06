"""Products with packed kernels, and moves by bits: values, gradients, and what XLA's CPU compiler
makes of bfloat16.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import compiled
from support.grids import always
from support.models import narrow_and_wide

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.inference.program import DecodeProgram, next_logits
from zflora_jax.nn.kv_cache import init_cache
from zflora_jax.ops import copies, linear


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_move_places_every_bit_and_passes_its_gradient_on(dtype: Any) -> None:
    """Also NaN and the sign of zero; the gradient of rows taken twice is the sum of theirs; under
    vmap.
    """
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
    x, kernel = (
        jnp.ones((*shape, 40), jnp.bfloat16),
        jnp.ones((6, 40), jnp.bfloat16).at[:, 0].set(256),
    )
    got = linear.packed_linear(x, kernel)
    assert got.dtype == jnp.bfloat16 and (got == jnp.bfloat16(256 + 39)).all()
    assert (linear.packed_linear(x, kernel, jnp.float32) == 256 + 39).all()


@pytest.mark.parametrize("batch", always([1, 3], lambda batch: batch == 1))
def test_a_packed_bfloat16_model_answers_as_its_float32_numbers_do(batch: int) -> None:
    """Prefill and a token after it, from a cache: within what rounding to 8 bits, layer by layer,
    makes of the logits.
    """
    narrow, wide = narrow_and_wide()
    tokens = np.random.default_rng(0).integers(0, 256, (batch, 9))
    step = jax.jit(next_logits, static_argnums=(0, 1))

    def last_logits(model: Model) -> Any:
        variables, cache = {"params": model.params}, init_cache(model.config, batch, 64)
        for part in (tokens[:, :8], tokens[:, 8:]):
            logits, cache = step(model.config, None, variables, part.astype(np.int32), None, cache)
        return np.asarray(logits, np.float64)

    want = last_logits(wide)
    gap, scale = np.abs(last_logits(pack_for_decode(narrow)) - want).max(), np.abs(want).max()
    assert 0 < gap <= 0.02 * scale
