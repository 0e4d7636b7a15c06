"""PiSSA and OLoRA: the start is taken out of the base as the peft library does, and nothing else
knows of it.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always
from support.huggingface import TOKENS, hf_logits, hf_model
from support.models import perturb, tiny_model
from support.quantized import quantized_tiny
from support.runs import quiet_train

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters, plain_lora, split_base
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.nn.llama import forward

LORA = AdapterConfig("lora", rank=4, alpha=6.0)
PISSA = LORA.replace(init="pissa")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("base") / "model"
    hf_model(head_dim=16).save_pretrained(path)
    return load_model(path)


@pytest.mark.parametrize("init", always(["pissa", "olora"], lambda init: init == "olora"))
def test_base_and_adapters_are_pefts(init: Any, base: Model, tmp_path: Path) -> None:
    """The same part leaves every kernel, the two compute what the base does, and trained adapters
    become plain LoRA of twice the rank, as PEFT converts its own.
    """
    adapter = LORA.replace(init=init, rank_pattern=(("q", 2),))
    split, start = split_base(base, adapter)
    assert start is not None
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": init}
    theirs = peft.get_peft_model(
        hf_model(head_dim=16), peft.LoraConfig(**settings, rank_pattern={"q_proj": 2})
    )
    state = theirs.state_dict()
    for name, value in state.items():
        if "lora_A" in name:
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1])
            kernel, group = parts[-4][:-5], "attn" if "self_attn" in parts else "mlp"
            leaves = start["layers"][group][kernel]
            ours = leaves["lora_a"][layer] @ leaves["lora_b"][layer]
            b = state[name.replace("lora_A", "lora_B")]
            np.testing.assert_allclose(ours, (b @ value).numpy().T, atol=2e-5)
            left = split.params["layers"][group][kernel]["kernel"][layer].reshape(ours.shape)
            weight = state[name.replace("lora_A.default", "base_layer")]
            np.testing.assert_allclose(left, weight.numpy().T, atol=2e-5)
    before = np.asarray(forward(base, TOKENS))
    assert_logits_close(forward(split, TOKENS, adapter, start), before)
    assert_logits_close(hf_logits(theirs.eval()), before)

    trained = perturb(start, std=0.05)
    ours = np.asarray(forward(split, TOKENS, adapter, trained))
    assert np.abs(ours - before).max() > 0.05 * np.abs(before).max()
    assert_logits_close(forward(fuse(split, adapter, trained), TOKENS), ours)
    with pytest.raises(ConfigError, match=r"was taken out of the base.*zf\.plain_lora"):
        save_peft(tmp_path / "out", split, adapter, trained)
    plain, tree = plain_lora(adapter, trained, start)
    assert (plain.rank, plain.init, plain.rank_of("q")) == (8, None, 4)
    assert_logits_close(forward(base, TOKENS, plain, tree), ours)
    with pytest.warns(match="vLLM refuses"):
        save_peft(tmp_path / "out", base, plain, tree)
    loaded = peft.PeftModel.from_pretrained(hf_model(head_dim=16), tmp_path / "out").eval()
    assert_logits_close(hf_logits(loaded), ours)
    again, back = load_peft(tmp_path / "out", base)
    assert_logits_close(forward(base, TOKENS, again, back), ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True, "alpha_pattern": (("v|up", 3.0),)},
        {"layers_to_transform": (1,)},
    ],
    ids=["dora", "rslora", "layers"],
)
def test_other_settings_of_lora(changes: Any) -> None:
    """Stacked layers or a tree for each; layers without an adapter keep their kernels."""
    base, adapter = tiny_model(), LORA.replace(init="pissa", **changes)
    tokens = TOKENS % 250
    split, start = split_base(base, adapter)
    assert start is not None
    assert_logits_close(forward(split, tokens, adapter, start), forward(base, tokens))
    layers = Model(base.config.replace(scan_layers=False), trees.unstack_layers(base.params, 2))
    apart, its_start = split_base(layers, adapter)
    for found, wanted in ((apart.params, split.params), (its_start, start)):
        other = trees.flatten(wanted)
        for name, leaf in trees.flatten(trees.stack_layers(found, 2)).items():
            np.testing.assert_allclose(leaf, other[name], atol=1e-5, err_msg=name)
    trained = perturb(start, std=0.05)
    if adapter.layers_to_transform:
        trained = jax.tree.map(lambda x: x.at[0].set(0.0), trained)
        kernels = (m.params["layers"]["attn"]["q"]["kernel"] for m in (split, base))
        np.testing.assert_array_equal(*(kernel[0] for kernel in kernels))
    plain, tree = plain_lora(adapter, trained, start)
    ours = forward(split, tokens, adapter, trained)
    assert_logits_close(forward(base, tokens, plain, tree), ours)


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    """The residual base is rounded once, and the product of the factors is not."""
    base, adapter = tiny_model(dtype="bfloat16"), PISSA
    base.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params)
    split, start = split_base(base, adapter)
    assert start is not None
    for tree, dtype in ((split.params, "bfloat16"), (start, "float32")):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(tree)} == {dtype}
    factors = start["layers"]["attn"]["q"]
    part = adapter.scale * np.asarray(factors["lora_a"] @ factors["lora_b"])
    kernel, left = (
        np.asarray(m.params["layers"]["attn"]["q"]["kernel"], np.float32).reshape(part.shape)
        for m in (base, split)
    )
    assert np.abs(left + part - kernel).max() <= np.abs(left).max() * 2**-8


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda: split_base(tiny_model(), PISSA.replace(rank=40)),
            r"init='pissa': rank 40 is above the smaller side of [kv]",
        ),
        (
            lambda: split_base(quantized_tiny("int8"), PISSA),
            r"init='pissa' .* stored as codes.*dequantize_model",
        ),
        (
            lambda: init_adapters(jax.random.key(0), tiny_model(), PISSA),
            r"base, adapters = zf\.split_base",
        ),
    ],
)
def test_starts_that_are_refused(use: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        use()
    assert split_base(model := tiny_model(), LORA) == (model, None)  # other starts leave the base


def test_a_run_resumes_and_is_exported(run: RunConfig, tmp_path: Path) -> None:
    """A resumed run, evaluation and exports take the same part out of the base again."""
    short = dataclasses.replace(run.train, steps=4)
    run = dataclasses.replace(run, adapter=LORA.replace(init="pissa"), train=short)
    whole = quiet_train(run, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
    (tmp_path / "half" / "report.json").unlink()
    assert_trees_equal(quiet_train(run, tmp_path / "half").adapters, whole.adapters)
    _, model, adapters, _ = load_run(tmp_path / "whole")
    assert_trees_equal(model.params, whole.model.params)
    assert_trees_equal(adapters, whole.adapters)
    tokens = np.arange(3, 19, dtype=np.int32)[None]
    trained = np.asarray(forward(model, tokens, run.adapter, adapters))
    first = load_model(run.model)
    assert not np.allclose(trained, forward(first, tokens), rtol=1e-3)
    assert_logits_close(forward(load_fused(tmp_path / "whole")[0], tokens), trained)
    export_run(tmp_path / "whole", tmp_path / "peft", format="peft")
    config, tree = load_peft(tmp_path / "peft", first)
    assert config.rank == 8
    assert_logits_close(forward(first, tokens, config, tree), trained)
