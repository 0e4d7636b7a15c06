"""Today's variants of LoRA (DoRA, ranks and alphas by kernel, some layers): values
and gradients are those of the peft library, and its directories go both ways.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from support.cases import DORA, LAYERS
from support.checks import assert_logits_close
from support.grids import always
from support.huggingface import TOKENS, hf_logits, hf_model
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.adapters.widths import count_params
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import OptimConfig
from zflora_jax.hf.load import load_model
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.nn.llama import Llama, forward
from zflora_jax.ops.linear import column_norms
from zflora_jax.training.optim import make_optimizer

WEIGHTS = np.random.default_rng(7).standard_normal(TOKENS.shape).astype(np.float32)
LORA = AdapterConfig("lora", rank=4, alpha=6.0)
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
    assert_logits_close(np.asarray(forward(base, tokens, again, back)), ours)
    assert count_params(base.config, again) == count_params(base.config, adapter)
    for kernel in ("q", "v", "down"):
        assert again.rank_of(kernel) == adapter.rank_of(kernel)
        assert again.scale_of(kernel) == pytest.approx(adapter.scale_of(kernel))
    for setting in ("layers_to_transform", "use_dora", "use_rslora"):
        assert getattr(again, setting) == getattr(adapter, setting)


def test_layers_that_are_left_out_stay(base: Model) -> None:
    """No step, and no weight decay, moves them."""
    adapters = init_adapters(jax.random.key(0), base, LAYERS)
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.1, warmup_steps=0), 9)
    state, tree, update = optimizer.init(adapters), adapters, jax.jit(optimizer.update)
    for _ in range(2):
        found = loss_gradients(base, LAYERS, tree)
        gradients = trees.unflatten({n: jnp.asarray(x) for n, x in found.items()})
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(gradients, state, tree)
        tree = jax.tree.map(jnp.add, tree, updates)
    first = trees.flatten(adapters)
    for name, leaf in trees.flatten(tree).items():
        np.testing.assert_array_equal(leaf[0], first[name][0])
        assert not np.array_equal(leaf[1], first[name][1]), name


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


@pytest.mark.parametrize("adapter", [DORA, LAYERS], ids=["dora", "layers"])
def test_decode_beside_the_base_is_decode_of_the_fused(adapter: AdapterConfig) -> None:
    """Also of heads with biases, which DoRA's norms leave alone."""
    model = tiny_model(family="qwen2")
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.2)
    prompt = [[3, 1, 4, 1, 5]]
    fused = generate_tokens(fuse(model, adapter, adapters), prompt, max_new_tokens=12)
    beside = generate_tokens(model, prompt, max_new_tokens=12, adapter=adapter, adapters=adapters)
    assert fused == beside != generate_tokens(model, prompt, max_new_tokens=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ffba", "use_dora": True}, r"use_dora=True: method 'ffba' does not have it"),
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
        (
            {"rank_pattern": {"down": 2}, "targets": "q|v"},
            r"adapter.rank_pattern: 'down' matches none of the kernels q, v",
        ),
        ({"alpha_pattern": {"mlp": 2.0}}, r"adapter.alpha_pattern: 'mlp' matches none of the"),
    ],
)
def test_settings_that_do_not_go_together_or_with_the_model(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_adapter(preset("tiny"), AdapterConfig(**{"method": "lora", "alpha": 6.0} | changes))
