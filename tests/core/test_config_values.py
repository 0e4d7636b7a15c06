"""Settings with impossible values are refused, with what is allowed."""

from __future__ import annotations

import math

import pytest

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict, override, to_dict
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import (
    OptimConfig,
    RunConfig,
)

TINY = to_dict(preset("tiny"))


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
        ("train.seed", -1, r"train\.seed=-1: must be from 0 to 2\*\*32 - 1"),
        ("eval.seed", 2**32, r"eval\.seed=4294967296: must be from 0"),  # JAX folds it into 0
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
