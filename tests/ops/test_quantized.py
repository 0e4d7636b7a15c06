"""Codes and scales: what they stand for, their products in every device's form, GGUF's bytes."""

import itertools
from dataclasses import replace
from typing import get_args

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from support.grids import always

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.quantize_config import QuantizeConfig, Stored, quantize_config
from zflora_jax.hf.gguf.file import KEPT, from_blocks, to_blocks
from zflora_jax.ops import kernels as products, quantized
from zflora_jax.ops.copies import write_divided
from zflora_jax.ops.quantized import bytes_of, dequantize, quantize, widen

RNG = np.random.default_rng(0)


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_settings_name_the_kinds_that_there_are():
    assert set(get_args(Stored)) == {"none", "keep", *quantized.KINDS}
    assert quantize_config("keep").embedding == "keep"
    assert quantize_config("nf4") == QuantizeConfig("nf4")
    with pytest.raises(ConfigError, match=r"quantize.kernels='int3'.*Allowed: int4"):
        quantize_config("int3")
    with pytest.raises(ConfigError, match=r"quantize.group=48: must be 0, 32, 64 or 128"):
        QuantizeConfig("int4", group=48)


@pytest.mark.parametrize("kind", KEPT)
def test_ggufs_blocks_are_ggufs_byte_for_byte(kind):
    rows, stored = numbers(6, 96), gguf.GGMLQuantizationType[kind.upper()]
    rows[2, 32:64] = 0  # a block without a scale
    rows[3, :32] = np.linspace(-1, 1, 32)  # halves between codes
    data = gguf.quantize(rows, stored)
    found = from_blocks(data, kind)
    np.testing.assert_array_equal(to_blocks(found), data)
    made = jax.jit(lambda x: quantize(x, kind, writes=0))(rows)
    for part, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(part), wanted)
    np.testing.assert_array_equal(np.asarray(dequantize(made)), gguf.dequantize(data, stored))


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_other_kinds_are_qwixs(kind):
    x, row = numbers(2, 64, 3, 5), quantized.KINDS[kind]
    wanted = qwix.quantize(
        jnp.asarray(x),
        kind if row.table else row.codes,
        channelwise_axes=[0, 2, 3],
        tiled_axes={1: row.group} if row.group else {},
        scale_dtype=jnp.float32,
    )
    found = quantize(jnp.asarray(x), kind, writes=2)
    np.testing.assert_array_equal(np.asarray(found.codes), np.asarray(wanted.qvalue))
    plain = replace(found, scales=wanted.scale)
    np.testing.assert_allclose(
        np.asarray(dequantize(plain)), np.asarray(qwix.dequantize(wanted)), rtol=1e-6
    )


def packed(kind, group, width=96, extra=10):
    """A kernel [5, width + extra] with an adapter's inputs, as decode reads it."""
    base = quantize(jnp.asarray(numbers(width, 5)), kind, group=group)
    wide = widen(base, base.axis, extra, 0)
    values, inputs = jnp.asarray(numbers(extra, 5)), slice(width, None)
    made = quantized.write_part(wide, values, wide.axis, inputs, slice(None), write_divided)
    back, block = quantized.cut(made, wide.axis, inputs), quantized.quantize_block(values, wide)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(block), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    fill = -extra % group if group else 0
    codes = jnp.pad(made.codes, ((0, fill), (0, 0)))
    return replace(made, codes=codes, inner=width + extra + fill)


FORMS = [("int8", 0), *((kind, 32) for kind in quantized.KINDS)]


@pytest.mark.parametrize(
    ("form", "rows"),
    always(
        itertools.product(FORMS, [1, 3, 11]),
        lambda case: case[1] == (1, 3, 11)[FORMS.index(case[0]) % 3],
    ),
)
def test_products_of_every_device_equal_the_dequantised(form, rows):
    kind, group = form
    columns = packed(kind, group)
    by_rows = replace(jax.tree.map(lambda part: part.T, columns), writes=0)
    x = jnp.asarray(numbers(rows, columns.shape[0]))
    wanted = np.asarray(x @ dequantize(columns))
    close = {"rtol": 0, "atol": 1e-5 * np.abs(wanted).max()}
    flat = [products.multiply_and_sum, products.eight_rows_product]
    found = [product(x, by_rows) for product in flat[: 2 if not group else 1]]
    if group:
        axes = -1, group, 5
        grouped = columns.map(lambda x: x.reshape(axes), lambda x: x[:, None], reads=2)
        found += [products.eight_rows_product(x, grouped)]
        found += [products.quantized_linear(x[:, None], grouped)[:, 0]]
    for y in found:
        np.testing.assert_allclose(np.asarray(y), wanted, **close)
    if kind == "int8" and not group:  # 15 bits of the inputs: half a step of each, at most
        step = np.abs(np.asarray(x)).max() / 127 / 254
        bound = step * np.abs(np.asarray(dequantize(columns))).sum(axis=0).max()
        found = products.int8_product(x, by_rows)
        error = np.abs(np.asarray(found) - wanted).max()
        assert 0 < error < bound
    for w in (by_rows, columns):
        y = products.quantized_linear(x[:, None], w)[:, 0]
        np.testing.assert_allclose(np.asarray(y), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", always(quantized.KINDS, ("int8", "nf4", "q4_1").__contains__))
def test_gradients_are_those_of_the_dequantised_kernel(kind):
    """Of inputs alone; also where few rows take a device's form, which rounds."""
    w, x = quantize(jnp.asarray(numbers(64, 3, 4)), kind, writes=2), jnp.asarray(numbers(2, 3, 64))
    table = quantize(jnp.asarray(numbers(7, 64)), kind, writes=0)
    for product, plain in (
        (
            lambda x: jnp.sin(products.quantized_tensordot(x, w)),
            lambda x: jnp.sin(jnp.tensordot(x, dequantize(w), 1)),
        ),
        (lambda x: products.quantized_linear(x, table), lambda x: x @ dequantize(table).T),
    ):
        found, wanted = (
            jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x))))(x) for f in (product, plain)
        )
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=1e-5)


def test_rows_of_a_table_are_the_dequantised_and_nan_where_there_is_none():
    table = quantize(jnp.asarray(numbers(7, 64)), "q4_1", writes=0)
    rows = products.table_rows(table, jnp.asarray([[3, 6], [7, 0]]), 70, jnp.float32)
    np.testing.assert_array_equal(np.asarray(rows[0, 1, :64]), np.asarray(dequantize(table))[6])
    assert not rows[0, :, 64:].any() and jnp.isnan(rows[1, 0]).all()


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_wrong_groups_are_refused(kind):
    with pytest.raises(ConfigError, match="groups of 48 inputs"):
        quantize(jnp.zeros((96, 2)), kind, group=48)
    if quantized.KINDS[kind].group:
        with pytest.raises(ConfigError, match=r"do not divide an axis of 40 inputs"):
            quantize(jnp.zeros((40, 2)), kind)


def test_bytes_are_those_of_a_device():
    """Two codes of 4 bits in one; scales of half a number; one for the inputs of all heads."""
    assert quantize(jnp.zeros((4, 8, 16)), "int8", reads=2).nbytes == 4 * 8 * 16 + 16 * 4
    assert quantize(jnp.zeros((64, 10)), "q4_1").nbytes == 64 * 10 // 2 + 2 * 2 * 2 * 10
    assert bytes_of(jax.ShapeDtypeStruct((3, 3), "bfloat16")) == 18
