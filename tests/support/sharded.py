"""A tiny model and a batch that eight devices divide."""

from __future__ import annotations

import numpy as np

from support.models import tiny_model
from zflora_jax.core.run_config import OptimConfig

# With Adam's usual eps the first updates are the signs of the gradients, and those of gradients
# near zero are rounding.
OPTIM = OptimConfig(warmup_steps=0, learning_rate=1e-2, eps=1e-3)


def sharded_model(**changes):
    """A tiny model whose every dimension 8 divides."""
    return tiny_model(num_heads=8, num_kv_heads=8, head_dim=8, vocab_size=264, **changes)


def batch(rows=8, length=24):
    draw = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[1, 10:] = 2
    segments[2, 20:] = 0
    return {
        "tokens": draw.integers(0, 250, (rows, length)).astype(np.int32),
        "loss_mask": (draw.random((rows, length)) < 0.6) & (segments > 0),
        "segments": segments,
    }
