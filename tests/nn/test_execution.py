"""What a model is and how it is run are two things, and `replace` takes settings of both."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import tiny_model

from zflora_jax import Llama, forward, init_cache, preset
from zflora_jax.core.fields import ConfigError, from_dict, to_dict
from zflora_jax.core.model_config import Execution, LlamaConfig
from zflora_jax.nn.blocks import segment_positions

CHANGES = {"dtype": "bfloat16", "scan_layers": False, "packed": True, "remat": "block"}


def test_settings_of_execution_are_taken_by_their_names_and_written_under_execution():
    config = preset("tiny").replace(**CHANGES)
    assert config.execution == Execution(**CHANGES)
    assert config.replace(remat="none").execution == Execution(**CHANGES | {"remat": "none"})
    assert config.replace(vocab_size=300).execution == config.execution
    written = json.loads(json.dumps(to_dict(config)))
    assert from_dict(LlamaConfig, written) == config
    del written["rope_theta"], written["execution"]["packed"]  # defaults
    assert from_dict(LlamaConfig, written) == config.replace(packed=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, r"dtype='float64': .*Allowed: bfloat16, float16, float32"),
        ({"packed": 1}, r"packed=1: expected bool"),
        ({"remat": 1}, r"remat=1: Allowed: block, dots, none"),
        ({"execution": 3}, r"execution=3: expected a table of Execution fields"),
    ],
)
def test_wrong_values_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset("tiny").replace(**changes)
    with pytest.raises(ConfigError, match=message):
        execution = changes.get("execution", changes)
        from_dict(LlamaConfig, to_dict(preset("tiny")) | {"execution": execution})


def test_tokens_masks_and_caches_that_do_not_go_together(tokens):
    model, ids = tiny_model(), jnp.ones(tokens.shape, jnp.int32)
    cache = init_cache(model.config, len(tokens), 64)

    def call(tokens, **given):
        return Llama(model.config).apply({"params": model.params}, tokens, **given)

    one_row = {"padding_mask": jnp.ones((1, tokens.shape[1]), bool)}
    for given, message in (
        # Also beside a cache, which would take a mask of one row for the first row alone.
        (one_row, r"padding_mask must have the tokens' shape"),
        (one_row | {"cache": cache}, r"padding_mask must have the tokens' shape"),
        ({"padding_mask": ids > 0, "segment_ids": ids}, "give them or padding_mask, not both"),
        ({"padding_mask": ids}, r"padding_mask must be bool.* go to segment_ids"),
        ({"cache": cache, "segment_ids": ids}, "cannot be continued from a cache: give padding_"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(tokens, **given)
    _, cache = call(tokens, cache=cache)
    longer = jnp.ones((len(tokens), 65 - tokens.shape[1]), jnp.int32)
    with pytest.raises(ConfigError, match=r"a cache of 64 slots has no room for \d+ more tokens"):
        call(longer, cache=cache)
    for wrong in ([1, 2], np.zeros((2, 0), int)):
        with pytest.raises(ConfigError, match=r"tokens of shape \(2.*must be \[B, T\]"):
            forward(model, wrong)
    assert forward(model, [[1, 2]]).shape == (1, 2, 259)


def test_positions_start_at_0_in_every_segment():
    assert segment_positions(jnp.asarray([[2, 2, 2, 5, 0, 0]])).tolist() == [[0, 1, 2, 0, 0, 1]]
