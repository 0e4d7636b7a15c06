"""The table of Hugging Face names covers the native tree, and its layouts are inverses."""

from __future__ import annotations

import numpy as np

from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.presets import preset
from zflora_jax.hf.keys import hf_table


def test_table_covers_the_native_tree() -> None:
    for scan in (True, False):
        config = preset("tiny").replace(num_layers=3, tie_word_embeddings=False, scan_layers=scan)
        assert {place.leaf for place in hf_table(config).values()} == set(param_shapes(config))


def test_layouts_are_inverses() -> None:
    for place in hf_table(preset("tiny").replace(head_dim=6)).values():
        x = np.random.default_rng(0).normal(size=place.shape)
        assert place.to_hf(x).shape == place.hf_shape and np.array_equal(
            place.to_native(place.to_hf(x)), x
        )
