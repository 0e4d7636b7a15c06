"""Configuration: what is accepted comes back unchanged, what is wrong is refused with what was
given, what is allowed and how to fix it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support.settings import RUNS

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, nearest, override, to_dict
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.core.run_config import DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig

TINY = to_dict(preset("tiny"))
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
SCALING |= {"original_max_position_embeddings": 8}

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
    message = r"unknown model preset 'llama-3\.2-1B': did you mean 'llama-3\.2-1b'\? Allowed: llama"
    with pytest.raises(ConfigError, match=message):
        preset("llama-3.2-1B")


@pytest.mark.parametrize("run", RUNS, ids=["default", "lora", "everything"])
def test_run_config_round_trips_through_json(run):
    assert from_dict(RunConfig, to_dict(run)) == run
    back = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert back == run and hash(back) == hash(run)


def test_scale_is_alpha_over_rank():
    assert AdapterConfig("lora", rank=6, alpha=9.0).scale == 1.5
    assert AdapterConfig("lora", rank=6).scale == 2.0


def test_a_run_decides_how_its_model_is_computed_and_not_what_it_is():
    config = preset("tiny").replace(scan_layers=False)
    train = TrainConfig(dtype="bfloat16", remat="block", matmul_precision="highest")
    changed = {"dtype": "bfloat16", "remat": "block", "matmul_precision": "highest"}
    assert train.applied_to(config) == config.replace(**changed) != config


# --- wrong keys, types and values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "tiny"}, r"unknown key 'modle': did you mean 'model'\? Allowed: adapter, data"),
        ({"adapter": {"method": "lora", "rnk": 4}}, r"key 'adapter\.rnk': did you mean 'rank'\?"),
        ({"data": {"batchsize": 4}}, r"key 'data\.batchsize': did you mean 'batch_size'\?"),
        ({"train": {"zzzz": 4}}, r"unknown key 'train\.zzzz': Allowed: dtype, eval_every"),
        ({1: 2}, "unknown key 1: Allowed"),
        ({"adapter": {}}, r"adapter is incomplete or damaged: method missing, and AdapterConfig h"),
        ({"adapter": {"method": "loar"}}, r"method 'loar': did you mean 'lora'\? Allowed: ffa, ff"),
        ({"adapter": "lora"}, r"adapter='lora': expected a table of AdapterConfig fields"),
        ({"model": 3}, r"model=3: expected str, got int"),
        ({"train": {"steps": "many"}}, r"train\.steps='many': expected int, got str"),
        ({"train": {"steps": 10.0}}, r"train\.steps=10\.0: expected int, got float"),
        ({"train": {"steps": True}}, r"train\.steps=True: expected int, got bool"),
        ({"data": {"packing": 1}}, r"data\.packing=1: expected bool \(True or False\), got int"),
        ({"optim": {"learning_rate": "1e-3"}}, r"learning_rate='1e-3': expected float, got str"),
        ({"optim": {"learning_rate": True}}, r"learning_rate=True: expected float, got bool"),
        ({"optim": {"learning_rate": math.inf}}, r"learning_rate=inf: expected a finite number"),
        ({"optim": {"learning_rate": 10**400}}, r"learning_rate=10+: expected a finite number"),
        ({"optim": {"schedule": "cosin"}}, r"did you mean 'cosine'\? Allowed: constant, cosine, l"),
        ({"optim": {"clip_norm": "one"}}, r"optim\.clip_norm='one': expected float"),
        ({"data": {"bucket_lengths": 128}}, r"expected a list of int, written as \[128\]"),
        ({"data": {"bucket_lengths": [64, "8"]}}, r"lengths\[1\]='8': expected int, got str"),
        ({"data": {"data_dir": 5}}, r"data\.data_dir=5: expected str"),
        ({"train": {"dtype": "float64"}}, r"train\.dtype='float64': .*Allowed: bfloat16, float32"),
        ([], r"RunConfig=\[\]: expected a table of RunConfig fields"),
    ],
    ids=str,
)
def test_wrong_keys_and_types_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name}=0: must be at least 1")
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim"),
                *("num_heads", "num_kv_heads", "max_position_embeddings"),
                *("base_hidden_size", "base_head_dim"),
            )
        ),
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3; grouped-query"),
        ({"head_dim": 15}, r"base_head_dim=15: RoPE turns pairs of dims, so it must be even"),
        ({"base_head_dim": 18}, r"base_head_dim=18 exceeds head_dim=16"),
        ({"base_head_dim": -2}, r"base_head_dim=-2: must be at least 1"),
        ({"base_hidden_size": 65}, r"base_hidden_size=65 exceeds hidden_size=64"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps=0\.0: must be positive"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0: must be positive"),
        ({"rope_scaling": SCALING | {"factor": 0.5}}, r"factor=0\.5: must"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 5}}, r"got 4\.0 and 5\.0"),
        ({"rope_scaling": SCALING | {"original_max_position_embeddings": 0}}, r"ings=0: must"),
        ({"rope_scaling": {"factor": 8}}, r"rope_scaling is incomplete or damaged: low_freq"),
    ],
    ids=str,
)
def test_impossible_models(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(LlamaConfig, TINY | changes)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"rank": 0}, r"adapter\.rank=0: must be at least 1 \(use the base model itself"),
        ("lora", {"rank": -3}, r"adapter\.rank=-3: must be at least 1"),
        ("lora", {"alpha": 0.0}, r"adapter\.alpha=0\.0: must be positive, or None for 2 \* rank"),
        ("lora", {"alpha": math.inf}, r"adapter\.alpha=inf: expected a finite number"),
        ("lora", {"alpha": math.nan}, r"adapter\.alpha=nan: expected a finite number"),
        ("lora", {"extra_mlp_units": 4}, r"extra_mlp_units=4: method 'lora' does not widen the"),
        ("full", {"extra_mlp_units": 0}, r"extra_mlp_units=0: method 'full' does not widen"),
        ("zflora-minimal", {"extra_head_dim": 8}, r"does not widen the heads stream; leave"),
        ("ffba", {"extra_mlp_units": -1}, r"adapter\.extra_mlp_units=-1: must be at least 0"),
        ("ffba", {"extra_head_dim": -2}, r"adapter\.extra_head_dim=-2: must be at least 0"),
        ("zflora-uniform", {"extra_head_dim": 7}, r"extra_head_dim=7 is odd: .* use an even width"),
    ],
)
def test_impossible_adapters(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(method, **changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.grad_accum_steps", 3, r"batch_size=8 is not a multiple of data\.grad_accum_steps=3"),
        *(
            (
                "data.bucket_lengths",
                lengths,
                r"data\.bucket_lengths=\[.*\]: expected increasing pos",
            )
            for lengths in ((), (128, 64), (64, 64), (0, 64))
        ),
        ("data.train_limit", 0, r"data\.train_limit=0: must be at least 1, or None for all rows"),
        ("data.seed", -1, r"data\.seed=-1: must be at least 0"),
        ("data.date", "26.11.2026", r"data\.date='26\.11\.2026': expected a day as YYYY-MM-DD"),
        ("optim.learning_rate", 0.0, r"optim\.learning_rate=0\.0: must be positive"),
        ("optim.warmup_steps", -1, r"optim\.warmup_steps=-1: must be at least 0"),
        ("optim.warmup_steps", 100, r"does not leave a step at full rate in train\.steps=100; low"),
        ("train.steps", 5, r"optim\.warmup_steps=10 does not leave a step"),
        ("optim.final_lr_fraction", 1.5, r"optim\.final_lr_fraction=1\.5: must be within 0\.\.1"),
        ("optim.loraplus_ratio", 0.0, r"optim\.loraplus_ratio=0\.0: must be positive"),
        ("optim.weight_decay", -0.1, r"optim\.weight_decay=-0\.1: must be at least 0"),
        ("optim.b1", 1.0, r"optim\.b1=1\.0: .* at least 0 and below 1"),
        ("optim.b2", -0.1, r"optim\.b2=-0\.1: .* at least 0 and below 1"),
        ("optim.eps", 0.0, r"optim\.eps=0\.0: must be positive"),
        ("optim.clip_norm", 0.0, r"clip_norm=0\.0: must be positive, or None to switch"),
        *(
            (f"{section}.{name}", 0, rf"{section}\.{name}=0: must be at least 1\.")
            for section, names in {
                "data": ("batch_size", "grad_accum_steps"),
                "train": ("steps", "loss_chunk", "log_every", "max_to_keep"),
                "eval": ("batch_size", "max_new_tokens"),
                "mesh": ("data", "fsdp", "tensor", "slices"),
            }.items()
            for name in names
        ),
        ("train.eval_every", 0, r"eval_every=0: must be at least 1, or None for the end only"),
        ("train.save_every", 0, r"save_every=0: must be at least 1, or None for the end only"),
        ("train.seed", -1, r"train\.seed=-1: must be from 0 to 2\*\*32 - 1"),
        ("eval.seed", 2**32, r"eval\.seed=4294967296: must be from 0"),  # JAX folds it into 0
        ("eval.limit", 0, r"eval\.limit=0: must be at least 1, or None for all examples"),
        ("eval.max_prompt_tokens", 0, r"must be at least 1, or None for the context less max_new"),
        ("train.keep_best", True, r"needs the loss of every checkpoint: set train\.eval"),
        ("mesh.data", 3, r"does not divide the 8 rows of a micro-batch .* a multiple of 3"),
    ],
)
def test_impossible_runs(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter.method": method, "optim.loraplus_ratio": 4.0},
            f"ratio=4.0: method '{method}' has no blocks of two kinds; leave it at 1",
        )
        for method in ("ffa", "full")
    ]
    + [
        (
            {"train.keep_best": True, "train.eval_every": 25},
            r"set eval\.split=validation, so that the test split stays unseen",
        ),
        ({"mesh.data": 4, "mesh.slices": 3}, r"mesh\.data=4 is not a multiple of mesh\.slices=3"),
        (
            {"adapter.method": "full", "quantize.kernels": "int8"},
            r"leave quantize\.\* at none, or train an adapter",
        ),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), changes)


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "50", 50),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("optim.learning_rate", "2", 2.0),
        ("optim.clip_norm", "None", None),
        ("optim.clip_norm", "3", 3.0),
        ("adapter.extra_mlp_units", "None", None),
        ("train.save_every", "None", None),
        ("train.remat", "block", "block"),
        ("data.packing", "True", True),
        ("data.bucket_lengths", "64,128", (64, 128)),
        ("data.bucket_lengths", "[64, 128]", (64, 128)),
        ("data.bucket_lengths", "(64,)", (64,)),
        ("data.bucket_lengths", "64", (64,)),
        ("train.report_to", "wandb", ("wandb",)),
        ("train.report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("train.report_to", "[trackio]", ("trackio",)),
        ("train.report_to", "[]", ()),
        ("adapter.layers_to_transform", "1", (1,)),
        ("data.data_dir", "12", "12"),
        ("data.data_dir", "true", "true"),
        ("data.data_dir", "None", None),
        ("adapter.targets", "[qv]", "[qv]"),
        ("eval.generate", "false", False),
        ("eval.generate", "true", True),
        ("optim.warmup_steps", 3, 3),
        ("data.bucket_lengths", [5, 6], (5, 6)),
    ],
)
def test_overrides_are_parsed_as_the_field_declares(key, text, value):
    lora = RunConfig(adapter=AdapterConfig("lora"))
    changed: Any = override(RunConfig() if "extra" in key else lora, {key: text})
    for part in key.split("."):
        changed = getattr(changed, part)
    assert changed == value and type(changed) is type(value)


def test_overrides_change_nothing_else_and_are_made_together():
    run = RunConfig()
    assert override(run, {}) == run
    changes = {"data.batch_size": "12", "data.grad_accum_steps": "3"}
    changes |= {"adapter.method": "ffba", "adapter.extra_head_dim": "8"}
    adapter = AdapterConfig("ffba", extra_head_dim=8)
    data = DataConfig(batch_size=12, grad_accum_steps=3)
    assert override(run, changes) == RunConfig(adapter=adapter, data=data)
    later = override(run, {"optim.warmup_steps": "200", "train.steps": "300"})
    assert later.optim.warmup_steps == 200
    table = "{'method': 'lora', 'rank': 3, 'targets': 'mlp'}"
    refined = override(run, {"adapter.rank": "5", "adapter": table}).adapter
    assert refined == AdapterConfig("lora", rank=5, targets="mlp")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trian.steps", "5", r"unknown key 'trian\.steps' of RunConfig: did you mean 'train'\?"),
        ("adapter.rnk", "5", r"unknown key 'rnk' of AdapterConfig: did you mean 'rank'\?"),
        ("adapter.rank", "0", r"adapter\.rank=0: must be at least 1"),
        ("adapter.rank", "8.0", r"adapter\.rank=8\.0: expected int, got float"),
        ("adapter.rank", "", r"rank='': expected int"),
        ("adapter.rank", "eight", r"rank='eight': expected int"),
        ("adapter.rank", "{[]: 1}", r"expected int"),
        ("adapter.rank", "(" * 5000, r"expected int"),
        ("adapter", "lora", r"adapter='lora': expected a table"),
        ("model.name", "x", r"'model\.name': 'model' has no fields of its own"),
        ("data.bucket_lengths", 128, r"lengths=128: expected a list of int"),
        ("data.bucket_lengths", "12.5", r"lengths\[0\]=12\.5: expected int"),
        ("data.prompt_style", "alpacca", r"did you mean 'alpaca'\? Allowed: alpaca, alpaca-eval"),
        ("train.remat", "yes", r"remat='yes': Allowed: block, dots, none"),
        ("data.packing", "yes", r"packing='yes': expected bool \(True or False\)"),
        ("train.steps", "None", r"steps=None: expected int"),
        ("optim.learning_rate", "1e999", r"learning_rate=inf: expected a finite number"),
    ],
)
def test_wrong_overrides(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), {key: value})


def test_nearest_lists_everything_allowed():
    assert nearest("rnk", ["rank", "alpha"]) == "did you mean 'rank'? Allowed: alpha, rank"
    assert nearest("zzz", ["rank", "alpha"]) == "Allowed: alpha, rank"
    assert nearest("RNK", ["Rank", "alpha"]) == "did you mean 'Rank'? Allowed: Rank, alpha"


# --- fuzz: a valid config, or a ConfigError with a sentence in it ---------------------------------

_SECTIONS = {"adapter": AdapterConfig, "data": DataConfig, "optim": OptimConfig}
_SECTIONS |= {"train": TrainConfig, "eval": EvalConfig}
_KEYS = sorted({f.name for cls in _SECTIONS.values() for f in dataclasses.fields(cls)})
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
    keys = st.sampled_from([*cls.__dataclass_fields__])
    start = {"method": "ffba"} if cls is AdapterConfig else {}
    tables = st.dictionaries(
        st.one_of(keys, keys, keys, _NAMES), st.one_of(_SCALARS, _VALUES), max_size=4
    )
    return st.one_of(tables.map(lambda table: start | table), _VALUES)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={name: _tables(cls) for name, cls in _SECTIONS.items()} | {"model": _SCALARS},
    )
)
def test_from_dict_of_a_run(values):
    try:
        run = from_dict(RunConfig, values)
    except ConfigError as error:
        assert len(str(error)) > 10
    else:
        assert from_dict(RunConfig, to_dict(run)) == run


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([LlamaConfig, RopeScaling, AdapterConfig, RunConfig]), _VALUES)
def test_from_dict_of_anything(cls, value):
    try:
        from_dict(cls, value)
    except ConfigError as error:
        assert len(str(error)) > 10


_DOTTED = st.sampled_from([f"{section}.{key}" for section in _SECTIONS for key in _KEYS])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.one_of(_DOTTED, st.text(max_size=6)),
        st.one_of(st.text(max_size=8), _SCALARS),
        max_size=3,
    )
)
def test_overrides_of_anything(changes):
    try:
        override(RunConfig(), changes)
    except ConfigError as error:
        assert len(str(error)) > 10
