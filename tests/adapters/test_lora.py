"""LoRA and its variants (DoRA, ranks and alphas by kernel, some layers, PiSSA, OLoRA): start,
values and gradients are those of the peft library, and its directories go both ways.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from support.cases import DORA
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always
from support.huggingface import TOKENS, hf_logits, hf_model
from support.models import perturb, tiny_model
from support.quantized import quantized_tiny
from support.runs import quiet_train

from zflora_jax import ConfigError, Model, count_params, export_run, load_model
from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters, plain_lora, split_base
from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.config import AdapterConfig, RunConfig, preset
from zflora_jax.core import trees
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.nn.llama import Llama, forward
from zflora_jax.ops.linear import column_norms

WEIGHTS = np.random.default_rng(7).standard_normal(TOKENS.shape).astype(np.float32)
LORA = AdapterConfig("lora", rank=4, alpha=6.0)
PISSA = LORA.replace(init="pissa")
VARIANTS = {
    "dora": LORA.replace(use_dora=True),
    "dora-rslora": LORA.replace(use_dora=True, use_rslora=True),
    "patterns": LORA.replace(rank_pattern=(("q|k", 2),), alpha_pattern=(("v|down", 3.0),)),
    "layers": LORA.replace(layers_to_transform=(1,)),
    "dora-patterns": DORA,
}
few_variants = pytest.mark.parametrize(  # each setting at least once
    "name", always(VARIANTS, lambda name: name not in ("dora", "patterns"))
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("base") / "model"
    hf_model(head_dim=16).save_pretrained(path)
    return load_model(path)


def loss_gradients(base: Model, adapter: AdapterConfig, adapters: Any) -> dict[str, np.ndarray]:
    """Of a weighted sum of all logits, in the adapters."""

    def loss(tree: Any) -> jax.Array:
        variables = {"params": base.params, "adapters": tree}
        logits = Llama(base.config, adapter).apply(variables, jnp.asarray(TOKENS))
        return jnp.sum(logits * WEIGHTS[..., None])  # type: ignore[operator]

    with jax.default_matmul_precision("highest"):
        found = trees.flatten(jax.jit(jax.grad(loss))(adapters))
    return {name: np.asarray(x) for name, x in found.items()}


def their_gradients(model: Any) -> dict[str, np.ndarray]:
    logits = model(torch.tensor(TOKENS)).logits
    (logits * torch.tensor(WEIGHTS)[..., None]).sum().backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}


@few_variants
def test_peft_computes_what_we_do(name: str, base: Model, tmp_path: Path) -> None:
    """Values and gradients, from a directory that we wrote, which is then read again."""
    adapter, tokens = VARIANTS[name], jnp.asarray(TOKENS)
    adapters = perturb(init_adapters(jax.random.key(0), base, adapter), std=0.05)
    if adapter.layers_to_transform:
        adapters = jax.tree.map(lambda x: x.at[0].set(0.0), adapters)
    ours = np.asarray(forward(base, tokens, adapter, adapters))
    warned = adapter.use_dora or adapter.rank_pattern
    with pytest.warns(match="vLLM refuses") if warned else contextlib.nullcontext():
        save_peft(tmp_path / "out", base, adapter, adapters)
    theirs = peft.PeftModel.from_pretrained(
        hf_model(head_dim=16), tmp_path / "out", is_trainable=True
    ).eval()
    assert_logits_close(hf_logits(theirs), ours)

    found, wanted = loss_gradients(base, adapter, adapters), their_gradients(theirs)
    assert len(wanted) > 0
    leaves = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}
    for key, gradient in wanted.items():
        parts = key.split(".")
        layer = int(parts[parts.index("layers") + 1])
        kernel = next(part[:-5] for part in parts if part.endswith("_proj"))
        leaf = next(leaves[part] for part in parts if part.startswith("lora_"))
        (own,) = [x for n, x in found.items() if n.endswith(f"/{kernel}/{leaf}")]
        scale = np.abs(own).max()
        np.testing.assert_allclose(own[layer], gradient.T, atol=2e-5 * scale, rtol=0)

    again, back = load_peft(tmp_path / "out", base)
    separate = load_peft(tmp_path / "out", load_model(str(base.source), scan_layers=False))[1]
    assert trees.fingerprint(separate) == trees.fingerprint(back)
    assert_logits_close(np.asarray(forward(base, tokens, again, back)), ours)
    assert count_params(base.config, again) == count_params(base.config, adapter)
    for kernel in ("q", "v", "down"):
        assert again.rank_of(kernel) == adapter.rank_of(kernel)
        assert again.scale_of(kernel) == pytest.approx(adapter.scale_of(kernel))
    for setting in ("layers_to_transform", "use_dora", "use_rslora"):
        assert getattr(again, setting) == getattr(adapter, setting)


def test_column_norms() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((12, 7), (12, 3), (3, 7))
    kernel, a, b = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    found = column_norms(kernel, a, b, 1.5)
    whole = np.asarray(kernel, np.float64) + 1.5 * np.asarray(a, np.float64) @ np.asarray(b)
    np.testing.assert_allclose(found, np.linalg.norm(whole, axis=0), rtol=1e-6)
    # W = -s A B: squares that cancel, to a little above or below 0.
    gone = column_norms(-1.5 * jnp.matmul(a, b, precision="highest"), a, b, 1.5)
    np.testing.assert_allclose(gone, 0.0, atol=2e-3 * float(found.max()))


def test_a_column_of_zeros_stays_a_column_of_zeros() -> None:
    model, adapter = tiny_model(), LORA.replace(use_dora=True)
    kernel = model.params["layers"]["mlp"]["gate"]["kernel"]
    model.params["layers"]["mlp"]["gate"]["kernel"] = kernel.at[..., 3].set(0.0)
    adapters = init_adapters(jax.random.key(0), model, adapter)
    tokens = jnp.asarray(TOKENS % 250)
    for found in (
        forward(model, tokens, adapter, adapters),
        forward(fuse(model, adapter, adapters), tokens),
    ):
        assert_logits_close(found, forward(model, tokens))
    slopes = jax.grad(lambda a: forward(model, tokens, adapter, a).sum())(adapters)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    of_gate = np.asarray(slopes["layers"]["mlp"]["gate"]["magnitude"])
    assert not of_gate[..., 3].any() and of_gate[..., :3].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ffa", "layers_to_transform": (0,)}, r"transform=\(0,\): method"),
        ({"method": "zflora-minimal", "init": "pissa"}, r"init='pissa': only method lora"),
        ({"layers_to_transform": ()}, r"layers_to_transform=\(\): must be layers from 0"),
        ({"layers_to_transform": (0,), "use_dora": True}, r"use_dora=True is for all layers"),
        ({"layers_to_transform": (1, 1)}, r"layers_to_transform=\(1, 1\): must be .*each once"),
        ({"rank_pattern": {"q": 0}}, r"adapter.rank_pattern: 0 for 'q' must be above 0"),
        ({"alpha_pattern": {"q(": 2.0}}, r"adapter.alpha_pattern: 'q\(' is not a valid regex"),
        ({"rank_pattern": {"q": "x"}}, r"adapter.rank_pattern\[0\]='x': expected int"),
        ({"rank_pattern": "q"}, r"'q': expected a list of pairs, written as {'NAME': VALUE}"),
        ({"rank_pattern": [["q"]]}, r"adapter.rank_pattern\[0\]=\['q'\]: expected \(str, int\)"),
        ({"layers_to_transform": (0, 2)}, r"has \[2\]: this model has the layers 0 to 1"),
        ({"rank_pattern": {"down": 2}, "targets": "q|v"}, "'down' matches none of the .* q, v"),
        ({"alpha_pattern": {"mlp|q": 2.0}}, r"alpha_pattern: 'mlp\|q' matches none of the"),
        ({"rank_pattern": {"[q_proj]": 8}}, r"'\[q_proj\]' matches none of .*, such as 'q\|v'"),
    ],
)
def test_settings_that_do_not_go_together_or_with_the_model(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_adapter(preset("tiny"), AdapterConfig(**{"method": "lora", "alpha": 6.0} | changes))


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


# --- PiSSA and OLoRA: the start is taken out of the base ------------------------------------------


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
    with pytest.raises(ConfigError, match=r"removed the start from the base.*zf\.plain_lora"):
        save_peft(tmp_path / "out", split, adapter, trained)
    plain, tree = plain_lora(adapter, trained, start)
    assert (plain.rank, plain.init, plain.rank_of("q")) == (8, None, 4)
    assert_logits_close(forward(base, TOKENS, plain, tree), ours)
    with pytest.warns(match="vLLM refuses"):
        save_peft(tmp_path / "out", base, plain, tree)
    loaded = peft.PeftModel.from_pretrained(hf_model(head_dim=16), tmp_path / "out").eval()
    assert_logits_close(hf_logits(loaded), ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True, "alpha_pattern": (("v|up", 3.0),), "layers_to_transform": (1,)},
    ],
    ids=["dora", "rslora-layers"],
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


@pytest.mark.soak  # a long run
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
