"""Comparisons with the tolerances of the project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from zflora_jax.core import trees

# float32: max |dlogit| <= TOLERANCE * max |logit|. CONTRIBUTING.md: never relaxed to make a test
# pass.
TOLERANCE = 1e-5


def assert_logits_close(got: object, want: object, share: float = TOLERANCE) -> None:
    """max |dlogit| <= share * max |logit|: another share than TOLERANCE for files of fewer bits."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    gap, scale = np.abs(got - want).max(), np.abs(want).max()
    assert gap <= share * scale, f"max |dlogit| {gap:.3g} exceeds {share} x {scale:.3g}"


def assert_trees_equal(got: trees.Tree, want: trees.Tree) -> None:
    got_flat, want_flat = trees.flatten(got), trees.flatten(want)
    assert got_flat.keys() == want_flat.keys()
    for name, leaf in want_flat.items():
        np.testing.assert_array_equal(np.asarray(got_flat[name]), np.asarray(leaf), err_msg=name)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr, those of inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def compiled(lowered: Any) -> Any:
    """The program that users run, to be read: with the fusion emitters that conftest.py turns off
    for the time they take.
    """
    if "--xla_cpu_use_fusion_emitters=false" not in os.environ.get("XLA_FLAGS", ""):
        return lowered.compile()
    return lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})
