"""LoRA starts as PEFT starts it; other methods' starts; a second adapter on a merged model."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from support.cases import LORA
from support.checks import assert_trees_equal
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.nn.llama import forward


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


@pytest.mark.parametrize(
    ("method", "init", "message"),
    [
        *(
            (m, "normal", f"'normal': method '{m}' does not have it.*unset")
            for m in ("ffa", "full")
        ),
        ("lora", "gaussian", "'gaussian': .*Allowed: kaiming_uniform, normal"),
    ],
)
def test_what_draws_nothing_has_no_start(method, init, message):
    with pytest.raises(ConfigError, match=rf"adapter\.init={message}"):
        AdapterConfig(method, init=init)


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
