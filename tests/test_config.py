"""Configuration: what is accepted comes back unchanged, what is wrong is refused with what was
given, what is allowed and how to fix it.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, nearest, override, to_dict
from zflora_jax.core.model_config import PRESETS, LlamaConfig, RopeScaling, preset
from zflora_jax.core.run_config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    from_file,
)

TINY = to_dict(preset("tiny"))
RUNS = [
    RunConfig(),
    RunConfig(
        model="tiny",
        adapter=AdapterConfig("lora", rank=3, alpha=1.5, targets="q|v"),
        eval=EvalConfig(split="validation", limit=None),
    ),
    RunConfig(
        adapter=AdapterConfig(
            "zflora-uniform", rank=18, extra_mlp_units=16, extra_head_dim=8, head_scores=False
        ),
        data=DataConfig("json", "some/dir", "alpaca", 12, 3, (7, 9), True, 5, 4),
        optim=OptimConfig(1e-4, "linear", 0, 0.1, 0.01, 0.8, 0.9, 1e-6, None),
        train=TrainConfig(7, 1, "bfloat16", True, 3, 2, None, 4, 1),
    ),
]


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
                r" model, optim, train\."
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
        ({"train": {"remat": 1}}, r"train\.remat=1: expected bool \(True or False\), got int"),
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


# --- impossible values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name}=0: must be at least 1")
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim")
        ),
        *(
            ({name: 0}, f"{name}=0: must be at least 1")
            for name in (
                "num_heads",
                "num_kv_heads",
                "max_position_embeddings",
                "base_hidden_size",
                "base_head_dim",
            )
        ),
        (
            {"num_kv_heads": 3},
            (
                r"num_heads=4 is not a multiple of num_kv_heads=3; grouped-query attention needs"
                r" whole groups"
            ),
        ),
        ({"head_dim": 15}, r"base_head_dim=15: RoPE turns pairs of dims, so it must be even"),
        ({"base_head_dim": 18}, r"base_head_dim=18 exceeds head_dim=16"),
        ({"base_head_dim": -2}, r"base_head_dim=-2: must be at least 1"),
        ({"base_hidden_size": 65}, r"base_hidden_size=65 exceeds hidden_size=64"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps=0\.0: must be positive"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0: must be positive"),
        (
            {
                "rope_scaling": {
                    "factor": 0.5,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8,
                }
            },
            r"factor=0\.5: must",
        ),
        (
            {
                "rope_scaling": {
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                    "original_max_position_embeddings": 8,
                }
            },
            r"got 1\.0 and 4\.0",
        ),
        (
            {
                "rope_scaling": {
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 0,
                }
            },
            r"embeddings=0: must",
        ),
        (
            {"rope_scaling": {"factor": 8}},
            r"rope_scaling is incomplete or damaged: low_freq_factor, high_freq_factor, ",
        ),
    ],
    ids=str,
)
def test_impossible_models(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(LlamaConfig, TINY | changes)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "lora",
            {"rank": 0},
            (
                r"adapter\.rank=0: must be at least 1 \(use the base model itself to run without an"
                r" adapter\)"
            ),
        ),
        ("lora", {"rank": -3}, r"adapter\.rank=-3: must be at least 1"),
        ("lora", {"alpha": 0.0}, r"adapter\.alpha=0\.0: must be positive, or None for 2 \* rank"),
        ("lora", {"alpha": math.inf}, r"adapter\.alpha=inf: expected a finite number"),
        ("lora", {"alpha": math.nan}, r"adapter\.alpha=nan: expected a finite number"),
        (
            "lora",
            {"extra_mlp_units": 4},
            (
                r"adapter\.extra_mlp_units=4: method 'lora' does not widen the MLP stream; leave"
                r" extra_mlp_units"
                r" unset"
            ),
        ),
        (
            "full",
            {"extra_mlp_units": 0},
            r"adapter\.extra_mlp_units=0: method 'full' does not widen",
        ),
        (
            "zflora-minimal",
            {"extra_head_dim": 8},
            (
                r"adapter\.extra_head_dim=8: method 'zflora-minimal' does not widen the heads"
                r" stream;"
                r" leave extra_head_dim unset"
            ),
        ),
        ("ffba", {"extra_mlp_units": -1}, r"adapter\.extra_mlp_units=-1: must be at least 0"),
        ("ffba", {"extra_head_dim": -2}, r"adapter\.extra_head_dim=-2: must be at least 0"),
        (
            "zflora-uniform",
            {"extra_head_dim": 7},
            r"adapter\.extra_head_dim=7 is odd: .* use an even width",
        ),
    ],
)
def test_impossible_adapters(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(method, **changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.batch_size", 0, r"data\.batch_size=0: must be at least 1"),
        ("data.grad_accum_steps", 0, r"data\.grad_accum_steps=0: must be at least 1"),
        (
            "data.grad_accum_steps",
            3,
            (
                r"data\.batch_size=8 is not a multiple of data\.grad_accum_steps=3; micro-batches"
                r" must be"
                r" equal"
            ),
        ),
        (
            "data.bucket_lengths",
            (),
            r"data\.bucket_lengths=\[\]: expected increasing positive lengths, e\.g\. \[128, 256\]",
        ),
        (
            "data.bucket_lengths",
            (128, 64),
            r"data\.bucket_lengths=\[128, 64\]: expected increasing",
        ),
        ("data.bucket_lengths", (64, 64), r"data\.bucket_lengths=\[64, 64\]: expected increasing"),
        (
            "data.bucket_lengths",
            (0, 64),
            r"data\.bucket_lengths=\[0, 64\]: expected increasing positive",
        ),
        ("data.train_limit", 0, r"data\.train_limit=0: must be at least 1, or None for all rows"),
        ("data.seed", -1, r"data\.seed=-1: must be at least 0"),
        ("optim.learning_rate", 0.0, r"optim\.learning_rate=0\.0: must be positive"),
        ("optim.warmup_steps", -1, r"optim\.warmup_steps=-1: must be at least 0"),
        (
            "optim.warmup_steps",
            100,
            (
                r"optim\.warmup_steps=100 does not leave a step at full rate in train\.steps=100;"
                r" lower warmup_steps"
            ),
        ),
        ("train.steps", 5, r"optim\.warmup_steps=10 does not leave a step"),
        ("optim.final_lr_fraction", 1.5, r"optim\.final_lr_fraction=1\.5: must be within 0\.\.1"),
        ("optim.loraplus_ratio", 0.0, r"optim\.loraplus_ratio=0\.0: must be positive"),
        ("optim.weight_decay", -0.1, r"optim\.weight_decay=-0\.1: must be at least 0"),
        ("optim.b1", 1.0, r"optim\.b1=1\.0: .* at least 0 and below 1"),
        ("optim.b2", -0.1, r"optim\.b2=-0\.1: .* at least 0 and below 1"),
        ("optim.eps", 0.0, r"optim\.eps=0\.0: must be positive"),
        (
            "optim.clip_norm",
            0.0,
            r"optim\.clip_norm=0\.0: must be positive, or None to switch clipping off",
        ),
        *(
            (f"train.{name}", 0, rf"train\.{name}=0: must be at least 1")
            for name in ("steps", "loss_chunk", "log_every", "max_to_keep")
        ),
        *(
            (f"train.{name}", 0, rf"train\.{name}=0: must be at least 1, or None for the end only")
            for name in ("eval_every", "save_every")
        ),
        ("train.seed", -1, r"train\.seed=-1: must be at least 0"),
        ("eval.limit", 0, r"eval\.limit=0: must be at least 1, or None for all examples"),
        ("eval.batch_size", 0, r"eval\.batch_size=0: must be at least 1"),
        ("eval.max_new_tokens", 0, r"eval\.max_new_tokens=0: must be at least 1"),
    ],
)
def test_impossible_runs(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), {key: value})


@pytest.mark.parametrize("method", ["ffa", "full"])
def test_lora_plus_needs_two_kinds_of_blocks(method):
    with pytest.raises(
        ConfigError,
        match=f"loraplus_ratio=4.0: method '{method}' has no blocks of two kinds; leave it at 1",
    ):
        RunConfig(adapter=AdapterConfig(method), optim=OptimConfig(loraplus_ratio=4.0))


# --- dotted overrides -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "50", 50),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("optim.learning_rate", "2", 2.0),
        ("optim.clip_norm", "None", None),
        ("optim.clip_norm", "3", 3.0),
        ("adapter.alpha", "32", 32.0),
        ("adapter.extra_mlp_units", "None", None),
        ("train.save_every", "None", None),
        ("train.remat", "True", True),
        ("data.bucket_lengths", "64,128", (64, 128)),
        ("data.bucket_lengths", "[64, 128]", (64, 128)),
        ("data.bucket_lengths", "(64,)", (64,)),
        ("train.report_to", "wandb", ("wandb",)),
        ("train.report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("train.report_to", "[trackio]", ("trackio",)),
        ("train.report_to", "[]", ()),
        ("data.data_dir", "a/b", "a/b"),
        ("data.data_dir", "12", "12"),
        ("data.data_dir", "None", None),
        ("data.prompt_style", "alpaca", "alpaca"),
        ("train.dtype", "bfloat16", "bfloat16"),
        ("adapter.targets", "q|v", "q|v"),
        ("adapter.targets", "[qv]", "[qv]"),
        ("model", "tiny", "tiny"),
        ("eval.generate", "False", False),
        ("eval.generate", "false", False),
        ("eval.generate", "true", True),
        ("data.data_dir", "true", "true"),
        ("optim.warmup_steps", 3, 3),
        ("data.bucket_lengths", [5, 6], (5, 6)),
    ],
)
def test_overrides_are_parsed_as_the_field_declares(key, text, value):
    changed: Any = override(RunConfig(), {key: text})
    for part in key.split("."):
        changed = getattr(changed, part)
    assert changed == value and type(changed) is type(value)


def test_overrides_change_nothing_else_and_are_made_together():
    run = RunConfig()
    assert override(run, {}) == run
    changed = override(
        run,
        {
            "data.batch_size": "12",
            "data.grad_accum_steps": "3",
            "adapter.method": "ffba",
            "adapter.extra_head_dim": "8",
        },
    )
    assert changed == RunConfig(
        adapter=AdapterConfig("ffba", extra_head_dim=8),
        data=DataConfig(batch_size=12, grad_accum_steps=3),
    )
    assert (
        override(run, {"optim.warmup_steps": "200", "train.steps": "300"}).optim.warmup_steps == 200
    )


def test_a_whole_table_can_be_overridden_and_refined():
    changed = override(
        RunConfig(),
        {"adapter.rank": "5", "adapter": "{'method': 'lora', 'rank': 3, 'targets': 'mlp'}"},
    )
    assert changed.adapter == AdapterConfig("lora", rank=5, targets="mlp")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trian.steps", "5", r"unknown key 'trian\.steps' of RunConfig: did you mean 'train'\?"),
        ("adapter.rnk", "5", r"unknown key 'rnk' of AdapterConfig: did you mean 'rank'\?"),
        ("adapter.rank", "0", r"adapter\.rank=0: must be at least 1"),
        ("adapter.rank", "8.0", r"rank=8\.0: expected int, got float"),
        ("adapter.rank", "", r"rank='': expected int"),
        ("adapter.rank", "eight", r"rank='eight': expected int"),
        ("adapter.rank", "{[]: 1}", r"expected int"),
        ("adapter.rank", "(" * 5000, r"expected int"),
        ("adapter", "lora", r"adapter='lora': expected a table"),
        ("model.name", "x", r"'model\.name': 'model' has no fields of its own"),
        ("data.bucket_lengths", "128", r"lengths=128: expected a list of int"),
        (
            "data.prompt_style",
            "alpacca",
            r"prompt_style='alpacca': did you mean 'alpaca'\? Allowed: alpaca, alpaca-eval, chat",
        ),
        ("train.remat", "yes", r"remat='yes': expected bool \(True or False\)"),
        ("train.steps", "None", r"steps=None: expected int"),
        ("optim.learning_rate", "1e999", r"learning_rate=inf: expected a finite number"),
    ],
)
def test_wrong_overrides(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), {key: value})


# --- fuzz -----------------------------------------------------------------------------------------

_KEYS = sorted(
    {
        key
        for run in RUNS
        for table in (to_dict(run), *to_dict(run).values())
        if isinstance(table, dict)
        for key in table
    }
)
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=2),
    st.sampled_from([*METHODS, "cosine", "chat", "float32", "test", 10**400]),
)
_NAMES = st.one_of(st.sampled_from(_KEYS), st.text(max_size=4), st.integers(0, 2))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner), st.dictionaries(_NAMES, inner, max_size=4)
    ),
    max_leaves=12,
)


def _tables(cls: type) -> st.SearchStrategy[dict[Any, Any]]:
    """Dicts whose keys are mostly those of `cls`, so that the fuzz reaches the values."""
    keys = st.sampled_from([f for f in cls.__dataclass_fields__])
    return st.dictionaries(
        st.one_of(keys, keys, keys, _NAMES), st.one_of(_SCALARS, _VALUES), max_size=4
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "adapter": st.one_of(
                _tables(AdapterConfig).map(lambda t: {"method": "ffba"} | t), _VALUES
            ),
            "data": st.one_of(_tables(DataConfig), _VALUES),
            "optim": st.one_of(_tables(OptimConfig), _VALUES),
            "train": st.one_of(_tables(TrainConfig), _VALUES),
            "eval": st.one_of(_tables(EvalConfig), _VALUES),
            "model": _SCALARS,
        },
    )
)
def test_from_dict_raises_config_errors_only(values):
    """Whatever the dict, the result is a valid config that round-trips, or a ConfigError with a
    sentence in it.
    """
    try:
        run = from_dict(RunConfig, values)
    except ConfigError as error:
        assert len(str(error)) > 10
    else:
        assert from_dict(RunConfig, to_dict(run)) == run


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([LlamaConfig, RopeScaling, AdapterConfig, RunConfig]), _VALUES)
def test_from_dict_of_anything_raises_config_errors_only(cls, value):
    try:
        from_dict(cls, value)
    except ConfigError as error:
        assert len(str(error)) > 10


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(
                [f"{t}.{k}" for t in ("adapter", "data", "optim", "train") for k in _KEYS]
            ),
            st.text(max_size=6),
        ),
        st.one_of(st.text(max_size=8), _SCALARS),
        max_size=3,
    )
)
def test_override_raises_config_errors_only(changes):
    try:
        override(RunConfig(), changes)
    except ConfigError as error:
        assert len(str(error)) > 10


def test_nearest_lists_everything_allowed():
    assert nearest("rnk", ["rank", "alpha"]) == "did you mean 'rank'? Allowed: alpha, rank"
    assert nearest("zzz", ["rank", "alpha"]) == "Allowed: alpha, rank"


OLD_NAMES = {
    "adapter.mlp_rank": "adapter.extra_mlp_units",
    "adapter.head_rank": "adapter.extra_head_dim",
    "data.accumulate": "data.grad_accum_steps",
    "data.lengths": "data.bucket_lengths",
    "train.keep": "train.max_to_keep",
}


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_settings_are_read_by_the_names_of_before(old, new):
    """From the command line, from files and from keywords, so that old runs and configs go on."""
    run = RunConfig(adapter=AdapterConfig("zflora-uniform"))
    value = {"data.bucket_lengths": (8, 16)}.get(new, 4)
    changed = override(run, {new: value})
    assert changed != run and override(run, {old: value}) == changed

    (section, name), (_, former) = new.split("."), old.split(".")
    table = to_dict(changed)
    table[section][former] = table[section].pop(name)
    assert from_file(RunConfig, table) == changed
    part = getattr(changed, section)
    kept = {k: v for k, v in to_dict(part).items() if k != name}
    assert type(part)(**kept, **{former: value}) == part


def test_model_settings_are_read_by_the_names_of_before():
    """zflora.json of older exports has them."""
    wide = preset("tiny").replace(
        hidden_size=72, base_hidden_size=64, head_dim=24, base_head_dim=16
    )
    table = to_dict(wide)
    table |= {"norm_dim": table.pop("base_hidden_size"), "rope_dim": table.pop("base_head_dim")}
    assert from_dict(LlamaConfig, table) == wide


def test_an_old_and_a_new_name_together_are_refused():
    with pytest.raises(ConfigError, match=r"mlp_rank: given under the old name and the new one"):
        AdapterConfig("zflora-minimal", mlp_rank=2, extra_mlp_units=2)
