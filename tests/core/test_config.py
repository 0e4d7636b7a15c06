"""Configuration: what is accepted comes back unchanged, what is wrong is refused with what was
given, what is allowed and how to fix it.
"""

import json
import math
from typing import Any

import pytest

from zflora_jax import PRESETS, AdapterConfig, LlamaConfig, preset
from zflora_jax.config import METHODS, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
from zflora_jax.core.fields import ConfigError, from_dict, nearest, override, to_dict

TINY = to_dict(preset("tiny"))
EVERYTHING = RunConfig(
    model="tiny",
    adapter=AdapterConfig("lora", 18, 1.5, "q|v", init="normal", rank_pattern=(("q", 8),)),
    data=DataConfig("rows", "some/dir", "alpaca", 12, 3, (7, 9), True, 5, 4),
    optim=OptimConfig(1e-4, "linear", 0, 0.1, 0.01, 0.8, 0.9, 1e-6, None),
    train=TrainConfig(7, 2.5, 1, "bfloat16", "block", "cross_entropy", 0.3, 3, 2, None, 4, 1),
    eval=EvalConfig("validation", limit=None),
)
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
SCALING |= {"original_max_position_embeddings": 8}

# --- presets, round trips -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_round_trip(name):
    config = preset(name)
    assert from_dict(LlamaConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.base_width == config.hidden_size and config.base_head_width == config.head_dim
    assert max(config.bos_token_id, *config.eos_token_ids) < config.vocab_size


@pytest.mark.parametrize("run", [RunConfig(), EVERYTHING], ids=["default", "everything"])
def test_run_config_round_trips_through_json(run):
    back = from_dict(RunConfig, json.loads(json.dumps(to_dict(run))))
    assert back == run and hash(back) == hash(run)


# --- wrong keys, types and values -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "tiny"}, r"unknown key 'modle': did you mean 'model'\? Allowed: adapter, data"),
        ({"adapter": {"method": "lora", "rnk": 4}}, r"key 'adapter\.rnk': did you mean 'rank'\?"),
        ({1: 2}, "unknown key 1: Allowed"),
        ({"model": ""}, "model=: must be a name or a path, not empty"),
        ({"data": {"data_dir": ""}}, r"data_dir=: must be a name or a path, not empty, or None"),
        ({"adapter": {}}, r"adapter is incomplete or damaged: method missing, and AdapterConfig h"),
        ({"adapter": "lora"}, r"adapter='lora': expected a table of AdapterConfig fields"),
        ({"train": {"steps": 10.0}}, r"train\.steps=10\.0: expected int, got float"),
        ({"train": {"steps": True}}, r"train\.steps=True: expected int, got bool"),
        ({"data": {"packing": 1}}, r"data\.packing=1: expected bool \(True or False\), got int"),
        ({"optim": {"learning_rate": True}}, r"learning_rate=True: expected float, got bool"),
        ({"optim": {"learning_rate": 10**400}}, r"learning_rate=10+: expected a finite number"),
        ({"optim": {"schedule": "cosin"}}, r"did you mean 'cosine'\? Allowed: constant, cosine, l"),
        ({"optim": {"clip_norm": "one"}}, r"optim\.clip_norm='one': expected float"),
        ({"data": {"bucket_lengths": [64, "8"]}}, r"lengths\[1\]='8': expected int, got str"),
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
            ({name: 0}, f"{name}=0: must be at least 1{none}")
            for none, names in {
                r"\.": (
                    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim"),
                    *("num_heads", "num_kv_heads", "max_position_embeddings"),
                ),
                ", or None": ("base_hidden_size", "base_head_dim"),
            }.items()
            for name in names
        ),
        ({"num_kv_heads": 3}, r"num_heads=4 is not a multiple of num_kv_heads=3; grouped-query"),
        ({"head_dim": 15}, r"base_head_dim=15: must be even, because RoPE rotates pairs"),
        ({"base_head_dim": 18}, r"base_head_dim=18 exceeds head_dim=16"),
        ({"base_hidden_size": 65}, r"base_hidden_size=65 exceeds hidden_size=64"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps=0\.0: must be positive"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0: must be positive"),
        ({"rope_scaling": SCALING | {"factor": 0.5}}, r"factor=0\.5: must"),
        ({"rope_scaling": SCALING | {"low_freq_factor": 5}}, r"got 4\.0 and 5\.0"),
        ({"rope_scaling": SCALING | {"original_max_position_embeddings": 0}}, r"ings=0: must"),
        ({"rope_scaling": {"factor": 8}}, r"rope_scaling is incomplete or damaged: low_freq"),
        ({"family": "qwen"}, "family='qwen'.*qwen2"),
        ({"sliding_window": 4}, "sliding_window=4.*mistral, qwen2, qwen3"),
        ({"family": "mistral", "sliding_window": 0}, "at least 1"),
        ({"nope_layers": (1,)}, "layers without RoPE.*smollm3"),
        ({"family": "smollm3", "nope_layers": (2,)}, "must be below num_layers=2"),
    ],
    ids=str,
)
def test_impossible_models(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(LlamaConfig, TINY | changes)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("loar", {}, r"method 'loar': did you mean 'lora'\? Allowed: ffa, ff"),
        ("dora", {}, "here that is `adapter.method=lora adapter.use_dora=True`. Allowed: ffa"),
        ("lora", {"r": 8}, "unknown key 'r' of AdapterConfig: here that is `adapter.rank`"),
        ("lora", {"rank": 0}, r"adapter\.rank=0: must be at least 1\."),
        ("lora", {"alpha": 0.0}, r"adapter\.alpha=0\.0: must be positive, or None"),
        ("lora", {"alpha": math.nan}, r"adapter\.alpha=nan: expected a finite number"),
        ("lora", {"use_rslora": True}, "use_rslora=True: give adapter.alpha too"),
        ("ffba", {"extra_mlp_units": -1}, r"adapter\.extra_mlp_units=-1: must be at least 0"),
        ("zflora-uniform", {"extra_head_dim": 7}, r"extra_head_dim=7 is odd: .* use an even width"),
        *(("lora", {"dropout": p}, "must be at least 0 and below 1") for p in (-0.1, 1.0, 1.5)),
        *(
            (
                method,
                {name: value},
                rf"{name}={value}: method '{method}' does not have it, only {f}",
            )
            for name, value, methods, f in (
                ("extra_mlp_units", 4, ("lora", "full"), "ffba, zflora-minimal, zflora-uniform"),
                ("extra_head_dim", 8, ("lora", "zflora-minimal"), "ffba, zflora-uniform"),
                ("head_scores", False, ("lora",), "ffba, zflora-uniform"),
                ("dropout", 0.1, METHODS.keys() - {"lora"}, r"lora\. Leave it unset"),
                ("use_dora", True, ("ffba",), "lora"),
            )
            for method in sorted(methods)
        ),
    ],
)
def test_impossible_adapters(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(method, **changes)


OPTIM = {"optim.loraplus_ratio": 4.0}
BEST = {"train.keep_best": True}
DPO = {"train.loss": "dpo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.grad_accum_steps": 3}, r"batch_size=8 is not a multiple of data\.grad_accum_st"),
        *(
            ({"data.bucket_lengths": lengths}, r"bucket_lengths=\(.*\): must be increasing lengths")
            for lengths in ((), (128, 64), (64, 64), (0, 64))
        ),
        ({"optim.warmup_steps": 100}, r"does not leave a step at full rate in train\.steps=100; l"),
        ({"optim.final_lr_fraction": 1.5}, r"optim\.final_lr_fraction=1\.5: must be from 0 to 1"),
        *(
            ({f"optim.{name}": 1.0}, "=1.0: must be at least 0 and below 1")
            for name in ("b1", "b2")
        ),
        *(
            ({f"optim.{name}": 0.0}, rf"{name}=0\.0: must be positive")
            for name in ("learning_rate", "loraplus_ratio", "eps", "clip_norm")
        ),
        *(({f"optim.{n}": -1}, "must be at least 0") for n in ("weight_decay", "warmup_steps")),
        *(
            ({f"{section}.{name}": 0}, rf"{section}\.{name}=0: must be at least 1{none}\.")
            for section, none, names in (
                ("data", "", ("batch_size", "grad_accum_steps")),
                ("data", ", or None", ("train_limit",)),
                ("train", "", ("loss_chunk", "log_every", "max_to_keep")),
                ("train", ", or None", ("steps", "eval_every", "save_every")),
                ("eval", "", ("batch_size", "max_new_tokens")),
                ("eval", ", or None", ("limit", "max_prompt_tokens")),
                ("mesh", "", ("data", "fsdp", "tensor")),
            )
            for name in names
        ),
        ({"data.seed": -1}, r"data\.seed=-1: must be at least 0"),
        ({"train.seed": -1}, r"train\.seed=-1: must be from 0 to 2\*\*32 - 1"),
        ({"eval.seed": 2**32}, r"eval\.seed=4294967296: must be from 0"),  # JAX folds it into 0
        (BEST, r"needs the loss of every checkpoint: set train\.eval"),
        (BEST | {"train.eval_every": 25}, r"set eval\.split=validation, so that the test split"),
        ({"mesh.data": 3, "mesh.fsdp": 2}, r"does not divide the 8 rows of a micro.*multiple of 6"),
        ({"adapter.method": "ffa"} | OPTIM, "ratio=4.0: method 'ffa' has only one type of block"),
        (
            {"adapter.method": "full", "quantize.kernels": "int8"},
            r"leave quantize\.\* at none, or train an adapter",
        ),
        (DPO | {"data.packing": True}, r"data\.packing=True does not go with train\.loss=dpo"),
        (DPO | {"data.train_on_prompt": True}, r"on_prompt=True does not go with train\.loss=dpo"),
        (DPO | {"adapter.method": "lora", "adapter.init": "pissa"}, r"init=pissa does not go with"),
        ({"trian.steps": "5"}, r"unknown key 'trian\.steps' of RunConfig: did you mean 'train'\?"),
        ({"learning_rate": 1e-4}, r"did you mean 'optim\.learning_rate'\? Allowed: adapter, data"),
        ({"train.batch_size": 4}, r"did you mean 'data\.batch_size' or 'eval\.batch_size'\?"),
        ({"train.gradient_checkpointing": 1}, "here that is `train.remat`: `block` for the least"),
        ({"adapter.rnk": "5"}, r"unknown key 'rnk' of AdapterConfig: did you mean 'rank'\?"),
        *(({"adapter.rank": text}, "expected int") for text in ("8.0", "", "eight", "{[]: 1}")),
        ({"adapter.rank": "(" * 5000}, r"expected int"),
        ({"model.name": "x"}, r"'model\.name': 'model' has no fields of its own"),
        ({"data.prompt_style": "alpacca"}, r"did you mean 'alpaca'\? Allowed: alpaca, alpaca-eval"),
        ({"data.packing": "yes"}, r"packing='yes': expected bool \(True or False\)"),
        ({"train.epochs": 0.0}, r"train\.epochs=0\.0: must be positive, or None"),
        ({"optim.learning_rate": "1e999"}, r"learning_rate=inf: expected a finite number"),
    ],
)
def test_impossible_runs(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(RunConfig(), changes)


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "50", 50),
        ("optim.learning_rate", "1e-3", 1e-3),
        ("train.save_every", "None", None),
        ("train.remat", "block", "block"),
        ("data.packing", "True", True),
        ("data.bucket_lengths", "64,128", (64, 128)),
        ("data.bucket_lengths", "[64, 128]", (64, 128)),
        ("data.bucket_lengths", "64", (64,)),
        ("train.report_to", "tensorboard, wandb", ("tensorboard", "wandb")),
        ("train.report_to", "[wandb]", ("wandb",)),
        ("train.report_to", "[]", ()),
        ("adapter.layers_to_transform", "1", (1,)),
        ("data.data_dir", "12", "12"),
        ("data.data_dir", "None", None),
        ("adapter.targets", "[qv]", "[qv]"),
        ("eval.generate", "false", False),
        ("optim.warmup_steps", 3, 3),
    ],
)
def test_overrides_are_parsed_as_the_field_declares(key, text, value):
    changed: Any = override(RunConfig(adapter=AdapterConfig("lora")), {key: text})
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
    table = "{'method': 'lora', 'rank': 3, 'targets': 'mlp'}"
    refined = override(run, {"adapter.rank": "5", "adapter": table}).adapter
    assert refined == AdapterConfig("lora", rank=5, targets="mlp")


def test_epochs_stand_in_for_steps_and_become_steps():
    epochs = {"train.epochs": "0.7", "data.batch_size": "1", "optim.warmup_steps": "6"}
    run = override(RunConfig(), epochs)
    assert (run.train.steps, run.in_steps(10).steps) == (None, 7)
    assert run.in_steps(10).train.epochs == 0.7  # on record, and the same once more
    assert run.in_steps(10).in_steps(10) == run.in_steps(10) and RunConfig().steps == 100
    with pytest.raises(ConfigError, match="depend on the training rows"):
        _ = run.steps
    for both in (run.in_steps(10), override(run, {"train.steps": 8, "train.epochs": 0.7})):
        with pytest.raises(ConfigError, match=r"epochs=0\.7, which of 99 rows, 1 a step, are 70 s"):
            both.in_steps(99)
    with pytest.raises(ConfigError, match=r"a step at full rate in train\.steps=7"):
        override(run, {"optim.warmup_steps": 7}).in_steps(10)
    assert override(run, {"train.steps": 9}).train == TrainConfig(9)


def test_nearest_lists_everything_allowed():
    assert nearest("zzz", ["rank", "alpha"]) == "Allowed: alpha, rank"
    assert nearest("RNK", ["Rank", "alpha"]) == "did you mean 'Rank'? Allowed: Rank, alpha"
    with pytest.raises(ConfigError, match=r"preset 'llama-3\.2-1B': did you mean 'llama-3\.2-1b'"):
        preset("llama-3.2-1B")
