"""LoRA's dropout beside DoRA and PiSSA drops what the peft library drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from support.checks import assert_logits_close
from support.huggingface import TOKENS, hf_logits, hf_model

from zflora_jax.adapters.init import init_adapters, split_base
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model
from zflora_jax.nn.layers import Dense
from zflora_jax.nn.llama import Llama, forward

LORA = AdapterConfig("lora", rank=4, alpha=6.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("base") / "model"
    hf_model(head_dim=16).save_pretrained(path)
    return load_model(path)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_dropout_drops_what_peft_drops(
    kind: str, base: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of every input in place of a random choice: DoRA's norms scale the base's product
    of dropped inputs, and the base without PiSSA's part does not drop out.
    """

    class Half(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return 0.5 * x

    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    given |= {"use_dora": True} if kind == "dora" else {"init_lora_weights": "pissa"}
    config = peft.LoraConfig(**given, lora_dropout=0.5)
    theirs = peft.get_peft_model(hf_model(head_dim=16), config).train()
    settings: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"init": "pissa"}
    adapter = LORA.replace(dropout=0.5, **settings)
    base, start = split_base(base, adapter)
    leaves = trees.flatten(start or init_adapters(jax.random.key(0), base, adapter))
    kernels = trees.flatten(base.params)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
        if kind == "pissa" and "_proj." in name:  # of one SVD, so of the same rounding
            parts, found = name.split("."), leaves if "lora_" in name else kernels
            layer = int(parts[parts.index("layers") + 1])
            kernel = next(part for part in parts if part.endswith("_proj")).removesuffix("_proj")
            block = f"lora_{parts[-3][-1].lower()}" if "lora_" in name else "kernel"
            (own,) = [n for n in found if n.endswith(f"/{kernel}/{block}")]
            value = parameter.data.numpy().T.reshape(found[own].shape[1:])
            found[own] = jnp.asarray(found[own]).at[layer].set(value)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Half()

    monkeypatch.setattr(Dense, "_dropped", lambda self, x: 0.5 * x)
    leaves = {n: 1.3 * x if n.endswith("magnitude") else x for n, x in leaves.items()}
    variables = {"params": trees.unflatten(kernels), "adapters": trees.unflatten(leaves)}
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(Llama(base.config, adapter).apply(variables, jnp.asarray(TOKENS)))
    assert_logits_close(hf_logits(theirs), ours)
    assert np.abs(ours - np.asarray(forward(base, jnp.asarray(TOKENS)))).max() > 0.1
