"""Decoding is one compiled call, whose loop joins no parameters and copies no cache; similar
prompts share one program.
"""

from __future__ import annotations

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import assert_logits_close, compiled
from support.grids import always
from support.models import perturb, tiny_model, untied

from zflora_jax import AdapterConfig, Model, forward, fuse, generate_tokens, pack_for_decode
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.widths import MULTIPLES
from zflora_jax.core import trees
from zflora_jax.inference.batching import padded_length
from zflora_jax.inference.generation_config import GenerationConfig, Sampler
from zflora_jax.inference.program import DecodeProgram


@pytest.mark.parametrize("kind", always(["cpu", "gpu", "tpu"], "tpu".__eq__))
def test_packed_kernels_are_filled_up_with_zeros(kind: str) -> None:
    """To the multiples of a type of device; they compute what the fused model computes."""
    model, adapter = untied(), AdapterConfig("zflora-minimal", rank=5, extra_mlp_units=5)
    fused = fuse(model, adapter, perturb(init_adapters(jax.random.key(1), model, adapter)))
    ready = pack_for_decode(fused, kind)
    d, f = fused.config.hidden_size, fused.config.intermediate_size
    wide_d, wide_f = (n + -n % m for n, m in zip((d, f), MULTIPLES[kind], strict=True))
    mlp = ready.params["layers_0"]["mlp"]
    up, down = (np.asarray(mlp[name]["kernel"]) for name in ("gate_up", "down"))
    assert up.shape == (2 * wide_f, wide_d) and down.shape == (wide_d, wide_f)
    assert d < wide_d and not up[:, d:].any() and up[:, d - 1].any() and not down[d:].any()
    assert f < wide_f and not up[f:wide_f].any() and not down[:, f:].any() and down[:, f - 1].any()
    for shape in ((1, 1), (1, 7), (3, 5)):
        tokens = np.random.default_rng(0).integers(0, 256, shape)
        assert_logits_close(forward(ready, tokens), forward(fused, tokens))


@pytest.mark.parametrize(
    ("beside", "batch", "kv_heads"),
    always(
        list(itertools.product(["fused", "lora"], [1, 2], [1, 2])),
        lambda case: case == ("fused", 1, 1),
    ),
)
def test_the_compiled_loop_copies_no_cache(
    beside: str, batch: int, kv_heads: int, request: pytest.FixtureRequest
) -> None:
    """Read off the HLO: the cache is updated in place, token after token."""
    base = tiny_model(num_kv_heads=kv_heads)
    adapter = None if beside == "fused" else AdapterConfig("lora", rank=4)
    model = pack_for_decode(base)
    variables = {"params": model.params}
    if adapter is not None:
        variables["adapters"] = trees.unstack_layers(
            init_adapters(jax.random.key(0), base, adapter), base.config.num_layers
        )
    tokens, keys = jnp.ones((batch, 16), jnp.int32), jax.random.split(jax.random.key(0), batch)
    real = tokens > 0
    request.getfixturevalue("optimised")  # for this program alone
    lowered = DecodeProgram.decode.lower(
        DecodeProgram(model.config, adapter), variables, tokens, real, keys, 8
    )
    text = compiled(lowered).as_text()
    (body,) = (
        re.findall(r"body=(%?[\w.-]+)", line)[0]
        for line in text.splitlines()
        if " while(" in line and '/while"' in line
    )
    c, cells = model.config, batch * kv_heads * model.config.head_dim * 64
    found = re.findall(
        r"(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", text.split(f"\n{body} (")[1].split("\n}")[0]
    )
    large = [
        (name, op)
        for name, dims, op in found
        if math.prod(int(n) for n in dims.split(",")) == cells
    ]
    assert sum(op == "fusion" for _, op in large) >= 2 * c.num_layers, (
        "the updates of keys and values"
    )
    assert not [name for name, op in large if "copy" in name or op == "copy"], (
        "an array of the cache is copied"
    )


@pytest.mark.parametrize(
    ("layout", "batch", "kv_heads"),
    always(
        list(itertools.product(["packed", "stacked"], [1, 2], [1, 2])),
        lambda case: case in [("packed", 1, 1), ("stacked", 2, 2)],
    ),
)
def test_greedy_is_the_argmax_of_whole_forwards(layout: str, batch: int, kv_heads: int) -> None:
    """Whatever axes of one the loop's cache goes without."""
    model = untied(num_kv_heads=kv_heads)
    tokens = jax.random.randint(jax.random.key(3), (batch, 16), 0, 250)
    run = pack_for_decode(model) if layout == "packed" else model
    assert run.config.execution.scan_layers == (layout == "stacked")
    keys = jax.random.split(jax.random.key(0), batch)
    program = DecodeProgram(run.config)
    out = program.decode({"params": run.params}, tokens, tokens >= 0, keys, 6)
    whole = np.concatenate([tokens, out], axis=1)
    found = np.argmax(forward(model, whole), axis=-1)[:, 15:-1]
    assert np.array_equal(found, out) and len(np.unique(out)) > 2


def test_the_number_of_tokens_that_follow_does_not_change_the_prefill() -> None:
    """1 token or 40 after 16: the same number of cache slots."""
    model = untied()
    tokens, keys = jnp.ones((1, 16), jnp.int32), jax.random.split(jax.random.key(0), 1)
    given = {"params": model.params}, tokens, tokens > 0, keys
    for new, slots in ((1, 64), (40, 64), (60, 128)):
        state = jax.eval_shape(lambda new=new: DecodeProgram(model.config).prefill(*given, new))
        assert state.cache.valid.shape == (1, slots)


def test_prompts_of_similar_length_share_one_compilation() -> None:
    model = tiny_model(seed=4, max_position_embeddings=500)  # a config that no other test decodes
    assert [padded_length(n) for n in (1, 16, 17, 8192, 8193)] == [16, 16, 32, 8192, 10240]
    before = DecodeProgram.decode._cache_size()
    for length in (3, 9, 16):
        generate_tokens(model, [[1] * length, [2]], max_new_tokens=4)
    assert DecodeProgram.decode._cache_size() == before + 1
    # An equal program, made anew, is the same one.
    config = GenerationConfig(max_new_tokens=4, sampler=Sampler(), stop_token_ids=[257])
    again = Model(model.config.replace(eos_token_ids=(257,)), model.params)
    generate_tokens(again, [[1] * 5, [2]], config)
    other = DecodeProgram.decode._cache_size()
    generate_tokens(again, [[1] * 6, [2]], max_new_tokens=4, stop_token_ids=(257,))
    assert DecodeProgram.decode._cache_size() == other
