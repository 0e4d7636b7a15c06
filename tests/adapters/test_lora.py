"""LoRA starts as PEFT starts it; files from before the start could be chosen are read as what they
were.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import LORA
from support.checks import assert_trees_equal
from support.models import perturb, tiny_model
from support.paths import ROOT

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.stored_config import from_file
from zflora_jax.experiments.info import describe
from zflora_jax.experiments.store import Job, read_result
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.hf.restore import MANIFEST
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import forward
from zflora_jax.training.workdir import adopt

RESULTS = ROOT / "results"


def shape_of(model: Model, rank: int, **changes: object) -> dict[str, np.ndarray]:
    adapter = AdapterConfig("lora", rank=rank, **changes)
    return trees.flatten(jax.device_get(init_adapters(jax.random.key(0), model, adapter)))


# --- the start ------------------------------------------------------------------------------------


def test_lora_starts_as_peft_starts_it():
    """Per kernel: the same range, spread and quantiles as the modules that PEFT itself makes; B is
    zero in both.
    """
    import peft
    import torch
    from support.huggingface import hf_model

    torch.manual_seed(3)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=256, target_modules=modules, task_type="CAUSAL_LM")
    theirs: dict[tuple[str, str], list[np.ndarray]] = {}
    for name, leaf in peft.get_peft_model(hf_model(), settings).named_parameters():
        if "lora_" in name:
            kernel, factor = name.split(".")[-4].removesuffix("_proj"), name.split(".")[-3]
            theirs.setdefault((kernel, factor.lower()), []).append(leaf.detach().numpy().ravel())
    config = tiny_model(hidden_size=48, intermediate_size=80, head_dim=12).config
    ours = shape_of(Model(config, {}), 256)
    for name, value in ours.items():
        _, _, kernel, factor = name.split("/")
        reference = np.concatenate(theirs.pop((kernel, factor)))
        assert value.size == reference.size
        if factor == "lora_b":
            assert not value.any() and not reference.any()
            continue
        bound = 1 / math.sqrt({"o": 48, "down": 80}.get(kernel, 48))
        for x in (value.astype(np.float64), reference.astype(np.float64)):
            n, std = x.size, bound / math.sqrt(3)
            assert np.abs(x).max() <= bound and np.abs(x).max() > 0.999 * bound
            # Of a uniform variable: the mean's error is std / sqrt n, the variance's 2 std^2 /
            # sqrt(5 n).
            assert abs(x.mean()) < 5 * std / math.sqrt(n)
            assert abs(x.var() / std**2 - 1) < 5 * 2 / math.sqrt(5 * n)
        at = np.linspace(0.05, 0.95, 19)
        gap = np.abs(np.quantile(value, at) - np.quantile(reference, at)) / (2 * bound)
        assert gap.max() < 5 * 0.5 * math.sqrt(2 / value.size)
    assert not theirs


def test_the_former_start_is_there_by_name():
    """Bit for bit: std 1/sqrt(in) times a normal draw keyed by the leaf's name."""
    model, key = tiny_model(), jax.random.key(0)
    for name, value in shape_of(model, 4, init="normal").items():
        _, _, kernel, factor = name.split("/")
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        std = 1 / math.sqrt({"down": 96}.get(kernel, 64))
        want = std * jax.random.normal(own, value.shape, jnp.float32)
        np.testing.assert_array_equal(value, want if factor == "lora_a" else np.zeros_like(value))
    named = shape_of(model, 4, init="kaiming_uniform")
    assert_trees_equal(shape_of(model, 4), named)


@pytest.mark.parametrize("method", ["ffba", "zflora-minimal", "zflora-uniform"])
def test_other_methods_start_normal_and_may_start_uniform(method):
    model, adapter = tiny_model(), AdapterConfig(method, rank=6)
    starts = {
        init: trees.flatten(init_adapters(jax.random.key(0), model, adapter.replace(init=init)))
        for init in (None, "normal", "kaiming_uniform")
    }
    assert_trees_equal(starts[None], starts["normal"])
    for name, leaf in starts["kaiming_uniform"].items():
        assert np.any(leaf) == np.any(starts[None][name]), name
        bound = 1 / math.sqrt(96 if "down" in name else 64)
        assert np.abs(leaf).max() <= bound and (
            not np.any(leaf) or np.abs(starts[None][name]).max() > bound
        ), name


@pytest.mark.parametrize("method", ["ffa", "full"])
def test_what_draws_nothing_has_no_start(method):
    with pytest.raises(
        ConfigError,
        match=(
            rf"adapter\.init='normal': method '{method}' draws nothing at random .*; leave init"
            r" unset"
        ),
    ):
        AdapterConfig(method, init="normal")
    with pytest.raises(
        ConfigError, match=r"adapter\.init='gaussian': .*Allowed: kaiming_uniform, normal"
    ):
        AdapterConfig("lora", init="gaussian")


# --- files from before the start could be chosen --------------------------------------------------


def without_start(config: dict) -> dict:
    return config | {
        "adapter": {k: v for k, v in config["adapter"].items() if k not in ("init", "dropout")}
    }


def test_files_without_a_start_say_normal_for_lora_alone():
    for method in METHODS:
        run = RunConfig(adapter=AdapterConfig(method))
        read = from_file(RunConfig, without_start(to_dict(run))).adapter
        assert read == from_file(AdapterConfig, without_start(to_dict(run))["adapter"])
        assert read.init == ("normal" if method == "lora" else None) and read.dropout == 0
        assert from_file(RunConfig, to_dict(run)) == run


def test_a_committed_record_is_one_of_the_former_start():
    """So a comparison of the new start makes its runs, and one of the former, by name,
    finds them.
    """
    path = RESULTS / "gsm8k_budget" / "lora-normal-lr0.001-seed0.json"
    config = json.loads(path.read_text())["config"]
    run = from_file(RunConfig, config)
    asked = {
        init: Job(
            "a", dataclasses.replace(run, adapter=AdapterConfig("lora", init=init)), path, path
        )
        for init in (None, "normal")
    }
    assert read_result(asked["normal"])["validation_loss"] > 0
    assert read_result(asked[None]) is None
    minimal = RESULTS / "gsm8k_budget" / "zflora-minimal-lr0.001-seed0.json"
    config = json.loads(minimal.read_text())["config"]
    assert read_result(Job("a", from_file(RunConfig, config), minimal, minimal)) is not None


def test_a_sweep_does_not_take_a_row_of_the_former_start(tmp_path):
    run, path = RunConfig(adapter=AdapterConfig("lora", rank=3)), tmp_path / "row.json"
    path.write_text(
        json.dumps({"config": without_start(to_dict(run)), "row": {"status": "finished"}})
    )
    asked = {
        init: Job("a", override(run, {"adapter.init": init}), tmp_path, path)
        for init in ("normal", "kaiming_uniform")
    }
    assert read_result(asked["normal"]) == {}
    assert read_result(asked["kaiming_uniform"]) is None


def test_a_run_of_the_former_start_is_resumed_without_saying_so(run, tmp_path):
    run = override(run, {"adapter.method": "lora", "train.steps": 3, "adapter.init": "normal"})
    first = train(run, tmp_path / "run", console=False)
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(without_start(json.loads(path.read_text()))))
    left_open = override(run, {"adapter.init": None})
    again = train(left_open, tmp_path / "run", console=False)
    assert again.report["config"]["adapter"]["init"] == "normal"
    assert_trees_equal(again.adapters, first.adapters)
    assert json.loads(path.read_text())["adapter"]["init"] == "normal"
    with pytest.raises(ConfigError, match=r"adapter\.init: 'normal' there, 'kaiming_uniform' now"):
        train(override(run, {"adapter.init": "kaiming_uniform"}), tmp_path / "run", console=False)
    adopt(tmp_path / "run", run)


def test_an_export_from_before_is_read(tmp_path):
    model = tiny_model()
    fused = fuse(model, LORA, perturb(init_adapters(jax.random.key(0), model, LORA)))
    save_hf(tmp_path, fused)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(without_start(manifest)))
    assert load_model(str(tmp_path)).adapter == LORA.replace(init="normal")
    assert describe(tmp_path)["method"] == "lora"


@pytest.mark.parametrize("second", ["lora", "zflora-minimal"])
def test_a_second_adapter_is_fused_into_a_merged_model(second):
    """A merged LoRA left an ordinary base: preference tuning after supervised tuning, say."""
    model, tokens = tiny_model(), np.arange(8, dtype=np.int32)[None]
    model.source = "the base"
    for seed, adapter in enumerate((LORA, AdapterConfig(second, rank=4))):
        adapters = perturb(init_adapters(jax.random.key(seed), model, adapter))
        beside = np.asarray(forward(model, tokens, adapter, adapters))
        model = fuse(model, adapter, adapters)
        np.testing.assert_allclose(np.asarray(forward(model, tokens)), beside, atol=1e-4)
    assert model.adapter.method == second
    assert model.source is None  # what `unfuse` gives back is no longer that base
