"""Configuration: what is accepted comes back unchanged, what is wrong is refused with what was
given, what is allowed and how to fix it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from support.settings import RUNS

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, to_dict
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.core.run_config import (
    RunConfig,
)

# --- presets, round trips -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_round_trip(name):
    config = preset(name)
    assert from_dict(LlamaConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.norm_dim == config.hidden_size and config.rotary_dim == config.head_dim
    assert all(
        0 <= token < config.vocab_size for token in (config.bos_token_id, *config.eos_token_ids)
    )


def test_unknown_preset_names_the_nearest():
    with pytest.raises(
        ConfigError,
        match=(
            r"unknown model preset 'llama-3\.2-1B': did you mean 'llama-3\.2-1b'\? Allowed:"
            r" llama-2-7b, "
        ),
    ):
        preset("llama-3.2-1B")


@pytest.mark.parametrize("run", RUNS, ids=["default", "lora", "everything"])
def test_run_config_round_trips_through_json(run):
    assert from_dict(RunConfig, to_dict(run)) == run
    back = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert back == run and hash(back) == hash(run)


def test_scale_is_alpha_over_rank():
    assert AdapterConfig("lora", rank=6, alpha=9.0).scale == 1.5
    assert AdapterConfig("lora", rank=6).scale == 2.0


def test_reading_a_config_needs_no_jax():
    code = (
        "import sys, zflora_jax.config as c; c.preset('tiny'); assert not {'jax', 'numpy'} &"
        " set(sys.modules), 'imports jax or numpy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- wrong keys and types -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"modle": "tiny"},
            (
                r"unknown key 'modle': did you mean 'model'\? Allowed: adapter, data, eval, mesh,"
                r" model, optim, quantize, train\."
            ),
        ),
        (
            {"adapter": {"method": "lora", "rnk": 4}},
            r"unknown key 'adapter\.rnk': did you mean 'rank'\?",
        ),
        ({"data": {"batchsize": 4}}, r"unknown key 'data\.batchsize': did you mean 'batch_size'\?"),
        ({"train": {"zzzz": 4}}, r"unknown key 'train\.zzzz': Allowed: dtype, eval_every"),
        ({1: 2}, "unknown key 1: Allowed"),
        (
            {"adapter": {}},
            (
                r"adapter is incomplete or damaged: method missing, and AdapterConfig has no"
                r" default for it"
            ),
        ),
        (
            {"adapter": {"method": "loar"}},
            r"unknown adapter method 'loar': did you mean 'lora'\? Allowed: ffa, ffba, full",
        ),
        ({"adapter": "lora"}, r"adapter='lora': expected a table of AdapterConfig fields"),
        ({"model": 3}, r"model=3: expected str, got int"),
        ({"train": {"steps": "many"}}, r"train\.steps='many': expected int, got str"),
        ({"train": {"steps": 10.0}}, r"train\.steps=10\.0: expected int, got float"),
        ({"train": {"steps": True}}, r"train\.steps=True: expected int, got bool"),
        ({"data": {"packing": 1}}, r"data\.packing=1: expected bool \(True or False\), got int"),
        (
            {"optim": {"learning_rate": "1e-3"}},
            r"optim\.learning_rate='1e-3': expected float, got str",
        ),
        (
            {"optim": {"learning_rate": True}},
            r"optim\.learning_rate=True: expected float, got bool",
        ),
        (
            {"optim": {"learning_rate": math.inf}},
            r"optim\.learning_rate=inf: expected a finite number",
        ),
        (
            {"optim": {"learning_rate": 10**400}},
            r"optim\.learning_rate=10+: expected a finite number",
        ),
        (
            {"optim": {"schedule": "cosin"}},
            r"optim\.schedule='cosin': did you mean 'cosine'\? Allowed: constant, cosine, linear",
        ),
        ({"optim": {"clip_norm": "one"}}, r"optim\.clip_norm='one': expected float"),
        (
            {"data": {"lengths": 128}},
            r"data\.bucket_lengths=128: expected a list of int, written as \[128\]",
        ),
        (
            {"data": {"lengths": [64, "128"]}},
            r"data\.bucket_lengths\[1\]='128': expected int, got str",
        ),
        ({"data": {"data_dir": 5}}, r"data\.data_dir=5: expected str"),
        ({"train": {"dtype": "float64"}}, r"train\.dtype='float64': .*Allowed: bfloat16, float32"),
        ({"train": {"dtype": "float16"}}, r"train\.dtype='float16': .*Allowed: bfloat16, float32"),
        ([], r"RunConfig=\[\]: expected a table of RunConfig fields"),
    ],
    ids=str,
)
def test_wrong_keys_and_types_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


# --- fuzz -----------------------------------------------------------------------------------------
