"""Parameter trees: names, stacking, fingerprints and the messages that say what differs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.models import tiny_model

from zflora_jax.core import trees


def small() -> trees.Tree:
    return {
        "embed": {"embedding": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "layers": {
            "attn": {"q": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}},
            "norm": np.ones((2, 3), np.float32),
        },
        "step": np.float32(3.0),
    }


def test_flatten_and_unflatten_are_inverse():
    flat = trees.flatten(small())
    assert list(flat) == ["embed/embedding", "layers/attn/q/kernel", "layers/norm", "step"]
    assert_trees_equal(trees.unflatten(dict(reversed(flat.items()))), small())
    assert trees.flatten({}) == {} and trees.unflatten({}) == {}


# --- stacking -------------------------------------------------------------------------------------


def test_stacking_and_unstacking_are_inverse():
    stacked = tiny_model(num_layers=12).params  # "layers_10" sorts before "layers_2"
    apart = trees.unstack_layers(stacked, 12)
    assert apart.keys() == {f"layers_{i}" for i in range(12)} | {"embed", "final_norm"}
    kernel = stacked["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(apart["layers_11"]["attn"]["q"]["kernel"], kernel[11])
    assert_trees_equal(trees.stack_layers(apart, 12), stacked)


# --- fingerprint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fingerprint_is_the_same_stacked_and_unstacked(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), tiny_model(num_layers=12).params)
    apart = trees.unstack_layers(params, 12)
    mark = trees.fingerprint(params)
    assert len(mark) == 64 and int(mark, 16) >= 0
    assert mark == trees.fingerprint(apart) == trees.fingerprint(jax.tree.map(np.asarray, params))


def changed(name: str, leaf: object) -> trees.Tree:
    return trees.unflatten(trees.flatten(small()) | {name: leaf})


KERNEL = small()["layers"]["attn"]["q"]["kernel"]
ONE_ULP = KERNEL.copy()
ONE_ULP[1, 2, 3] = np.nextafter(ONE_ULP[1, 2, 3], np.float32(np.inf))
NEGATIVE_ZERO = KERNEL.copy()
NEGATIVE_ZERO[0, 0, 0] = -0.0


@pytest.mark.parametrize(
    "other",
    [
        changed("layers/attn/q/kernel", ONE_ULP),
        changed("layers/attn/q/kernel", NEGATIVE_ZERO),
        changed("layers/attn/q/kernel", KERNEL[::-1]),  # the same layers in another order
        changed("layers/attn/q/kernel", KERNEL.reshape(2, 4, 3)),
        changed("layers/attn/q/kernel", KERNEL.astype(np.float64)),
        changed("layers/attn/q/kernel", KERNEL.astype(ml_dtypes.bfloat16)),
        changed("layers/attn/q/kernel", KERNEL.view(np.int32)),  # the same bytes
        changed("layers/attn/k/kernel", KERNEL),
        changed("step", np.float32(4.0)),
        {k: v for k, v in small().items() if k != "step"},
        {("embedding" if k == "embed" else k): v for k, v in small().items()},
    ],
    ids="ulp zero order shape float64 bfloat16 int32 extra scalar missing renamed".split(),
)
def test_fingerprint_changes_with_any_value_name_shape_or_dtype(other):
    assert trees.fingerprint(other) != trees.fingerprint(small())


# --- messages -------------------------------------------------------------------------------------


def test_difference_lists_missing_then_unexpected_with_the_nearest_missing_name():
    assert trees.difference(["a", "b"], ["b", "a"]) == ""
    names = ["attn/q/forward", "attn/k/forward", "norm"]
    assert trees.difference(names, ["attn/q/foward", "norm", "zzz"]).splitlines() == [
        "- missing    attn/k/forward",
        "- missing    attn/q/forward",
        "+ unexpected attn/q/foward (did you mean attn/q/forward?)",
        "+ unexpected zzz",
    ]


SPEC = trees.map_with_names(lambda _, x: jax.ShapeDtypeStruct(x.shape, x.dtype), small())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed": {}}, r"the tree does not have the expected leaves:\n- missing    embed/embed"),
        (changed("stepp", np.float32(0)), r"\+ unexpected stepp"),
        (changed("layers/norm", np.ones((2, 4))), r"tree: layers/norm has shape \(2, 4\), exp"),
        *(
            (changed("layers/norm", leaf), "the tree: layers/norm holds NaN or infinite values")
            for leaf in (
                np.full((2, 3), np.nan, np.float32),
                jnp.full((2, 3), -jnp.inf),
                jnp.full((2, 3), jnp.nan, jnp.bfloat16),
            )
        ),
    ],
    ids=["missing", "unexpected", "shape", "NaN", "infinite", "bfloat16"],
)
def test_check_like_names_the_leaf(given, message):
    with pytest.raises(ValueError, match=message):
        trees.check_like(given, SPEC, "the tree")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_no_array_keeps_what_was_asked_of_it(dtype):
    array = jnp.arange(6).astype(dtype).reshape(2, 3)
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(trees.on_host(array).astype(np.float32), wanted)
    np.testing.assert_array_equal(trees.on_host(array, 1).astype(np.float32), wanted[1])
    assert array._npy_value is None


def test_a_fingerprint_takes_a_large_table_in_pieces(monkeypatch):
    table = np.arange(77, dtype=np.float32).reshape(11, 7)
    tree, corner = {"table": jnp.asarray(table), "n": np.float32(2)}, {"table": (9, 5), "n": ()}
    want = trees.fingerprint(tree), trees.fingerprint(tree, corner)
    monkeypatch.setattr(trees, "PIECE_BYTES", 70)  # two rows of 28 bytes
    pieces = list(trees._pieces(tree["table"], 9))
    np.testing.assert_array_equal(np.concatenate(pieces), table[:9])
    assert [len(piece) for piece in pieces] == [2, 2, 2, 2, 1]
    assert (trees.fingerprint(tree), trees.fingerprint(tree, corner)) == want
