"""Dotted overrides of settings, fuzzed settings, settings by their names of before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from support.settings import OLD_NAMES, RUNS

from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, nearest, override, to_dict
from zflora_jax.core.model_config import LlamaConfig, RopeScaling
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
from zflora_jax.core.stored_config import from_file


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
        ("train.remat", "True", "block"),
        ("train.remat", "offload", "offload"),
        ("data.packing", "True", True),
        ("data.bucket_lengths", "64,128", (64, 128)),
        ("data.bucket_lengths", "[64, 128]", (64, 128)),
        ("data.bucket_lengths", "(64,)", (64,)),
        ("data.bucket_lengths", "64", (64,)),
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


def test_one_number_stands_for_a_list_of_it_where_none_may_stand_too():
    found = override(AdapterConfig("lora"), {"layers_to_transform": "1"})
    assert found.layers_to_transform == (1,)


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
        ("data.bucket_lengths", 128, r"lengths=128: expected a list of int"),
        ("data.bucket_lengths", "12.5", r"lengths\[0\]=12\.5: expected int"),
        (
            "data.prompt_style",
            "alpacca",
            r"prompt_style='alpacca': did you mean 'alpaca'\? Allowed: alpaca, alpaca-eval, chat",
        ),
        ("train.remat", "yes", r"remat='yes': Allowed: block, dots, none, offload"),
        ("data.packing", "yes", r"packing='yes': expected bool \(True or False\)"),
        ("train.steps", "None", r"steps=None: expected int"),
        ("optim.learning_rate", "1e999", r"learning_rate=inf: expected a finite number"),
    ],
)
def test_wrong_overrides(key, value, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), {key: value})


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
    assert nearest("RNK", ["Rank", "alpha"]) == "did you mean 'Rank'? Allowed: Rank, alpha"


@pytest.mark.parametrize(
    ("section", "name", "former"),
    [(section, *names) for section in OLD_NAMES for names in OLD_NAMES[section].items()],
)
def test_settings_are_read_by_the_names_of_before(section, name, former):
    """From the command line, from files and from keywords, so that old runs and configs go on."""
    run = RunConfig(adapter=AdapterConfig("zflora-uniform"))
    value = {"bucket_lengths": (8, 16)}.get(name, 4)
    changed = override(run, {f"{section}.{name}": value})
    assert changed != run and override(run, {f"{section}.{former}": value}) == changed

    with pytest.raises(ConfigError, match=f"{name} is given by another name too"):
        override(run, {f"{section}.{former}": value, f"{section}.{name}": value})
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
    with pytest.raises(
        ConfigError,
        match=r"mlp_rank is the name of before of extra_mlp_units, which is given too: give one",
    ):
        AdapterConfig("zflora-minimal", mlp_rank=2, extra_mlp_units=2)


def test_replace_takes_the_names_of_before():
    adapter = AdapterConfig("zflora-uniform")
    assert adapter.replace(mlp_rank=4) == adapter.replace(extra_mlp_units=4) != adapter
    tiny = preset("tiny")
    assert tiny.replace(rope_dim=8) == tiny.replace(base_head_dim=8) != tiny
    with pytest.raises(ConfigError, match="keep is the name of before of max_to_keep"):
        dataclasses.replace(TrainConfig(), keep=3)
