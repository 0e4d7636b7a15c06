"""eps_z, which stock form needs because a joint norm sees the state: chosen from the weights or by
the user; its effect on float32 logits and on int8.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import case_id
from support.checks import TOLERANCE, assert_trees_equal
from support.exports import perturbed_adapters
from support.models import tiny_model

from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.hf.load import load_model
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.stock import CHOICES, choose_eps_z, state_share
from zflora_jax.nn.llama import forward

pytestmark = pytest.mark.filterwarnings("ignore:head_dim")
STATE = [AdapterConfig(method, rank=6, alpha=9.0) for method in METHODS if METHODS[method].residual]
STATE += [STATE[0].replace(targets="q|v|o|down")]
MINIMAL = AdapterConfig("zflora-minimal", rank=8)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


def trained_like(seed: int = 0, std: float = 0.02, **changes: object) -> Model:
    """Adapters near their initialisation, as training leaves them."""
    model = tiny_model(seed, num_layers=3, **changes)
    return fuse(model, MINIMAL, perturbed_adapters(model, MINIMAL, std))


def saved_eps(path: Path) -> float:
    return json.loads((path / "zflora.json").read_text())["eps_z"]


def as_stock(model: Model, eps: float, path: Path) -> Model:
    save_hf(path, model, eps_z=eps)
    return load_stock(path)


def logits(model: Model) -> np.ndarray:
    return np.asarray(forward(model, TOKENS), np.float64)


@pytest.mark.parametrize("adapter", STATE, ids=case_id)
def test_the_chosen_scale_keeps_float32_logits(adapter: AdapterConfig, tmp_path: Path) -> None:
    """Also of adapters perturbed by 0.1, which is more than training moves them."""
    model = tiny_model(num_layers=2, tie_word_embeddings=False)
    fused = fuse(model, adapter, perturbed_adapters(model, adapter, 0.1))
    eps_z = save_hf(tmp_path / "out", fused)["eps_z"]
    assert eps_z == saved_eps(tmp_path / "out") == choose_eps_z(fused, "float32")
    gap = export_gap(fused, tmp_path / "out", TOKENS)
    assert gap["max_abs_dlogit"] <= TOLERANCE * gap["logit_scale"]
    assert 2**-10 <= eps_z <= 2**-6 and choose_eps_z(fused, "bfloat16") >= 16 * eps_z


def test_the_choice_follows_the_weights() -> None:
    fused = trained_like()
    share, d = state_share(fused), fused.config.norm_dim

    def scaled(factor: float) -> Model:
        """The state times `factor`: as a larger adapter would write it."""

        def visit(name: str, x: jax.Array) -> jax.Array:
            written = name.endswith(("o/kernel", "down/kernel"))
            return x.at[..., d:].multiply(factor) if written else x

        return Model(fused.config, trees.map_with_names(visit, fused.params), adapter=MINIMAL)

    assert state_share(scaled(0.25)) == pytest.approx(share / 16, rel=1e-6)
    for dtype in ("float32", "bfloat16"):
        assert choose_eps_z(scaled(0.25), dtype) == 4 * choose_eps_z(fused, dtype)
    assert choose_eps_z(scaled(0.0), "float32") == 1.0
    assert choose_eps_z(scaled(1e6), "float32") == CHOICES[-1] == 2.0**-10
    assert choose_eps_z(scaled(1e6), "float16") == 2.0**-4  # float16 cannot hold less
    flat = Model(fused.config.replace(scan_layers=False), trees.unstack_layers(fused.params, 3))
    assert state_share(flat) == pytest.approx(share, rel=1e-6)
    assert state_share(tiny_model()) == 0.0 and choose_eps_z(tiny_model(), "float32") == 1.0


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_bounds_the_share_of_every_token(seed: int, tmp_path: Path) -> None:
    """The safety factor covers the excess of single tokens over the estimate from the weights."""
    fused = trained_like(seed, tie_word_embeddings=False)
    want, gained = logits(fused), {}
    for eps in (0.5, 0.25):  # large enough to be seen above the rounding of float32
        wrong = np.abs(logits(as_stock(fused, eps, tmp_path / "out")) - want)
        gained[eps] = wrong.max() / np.abs(want).max()
        assert gained[eps] <= 4 * state_share(fused) * eps**2 / 2
    assert gained[0.5] / gained[0.25] == pytest.approx(4, rel=0.3)  # the square of eps_z


@pytest.mark.parametrize("eps", [2.0**-10, 0.0625, 1.0])
def test_a_named_scale_is_written_and_read_back(eps: float, tmp_path: Path) -> None:
    fused = trained_like()
    assert save_hf(tmp_path / "out", fused, eps_z=eps)["eps_z"] == eps
    assert saved_eps(tmp_path / "out") == eps
    assert_trees_equal(load_model(tmp_path / "out").params, fused.params)
    gap = export_gap(fused, tmp_path / "out", TOKENS)
    assert (gap["max_abs_dlogit"] > TOLERANCE * gap["logit_scale"]) == (eps > 2**-7)


def test_other_scales_are_refused(tmp_path: Path) -> None:
    fused = trained_like()
    for eps in (0.1, 2.0, 2.0**-11, 0.0, -0.5, float("nan")):
        with pytest.raises(ConfigError, match=r"power of two from 2\^-10.*int8"):
            save_hf(tmp_path / "out", fused, eps_z=eps)
    with pytest.raises(ConfigError, match="this model has none"):
        save_hf(tmp_path / "out", tiny_model(), eps_z=0.0625)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_state_has_no_scale(tmp_path: Path) -> None:
    report = save_hf(tmp_path / "out", tiny_model())
    assert "eps_z" not in report and saved_eps(tmp_path / "out") == 1
    assert report["widths"] == "hidden 64, heads 4 x 16, MLP 96"


def test_int8_by_channel_of_the_bfloat16_choice_is_as_good_as_of_the_base(tmp_path: Path) -> None:
    """Every matrix rounded to int8 with one scale for each output channel."""

    def rounded(name: str, x: jax.Array) -> jax.Array:
        if name.endswith("scale"):
            return x
        first = int(name.startswith("layers/"))
        outputs = {"embedding": (0,), "q": (1, 2), "k": (1, 2), "v": (1, 2), "o": (2,)}
        kept = outputs.get(name.split("/")[-1], outputs.get(name.split("/")[-2], (1,)))
        axes = tuple(i for i in range(first, x.ndim) if i - first not in kept)
        step = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), 1e-30) / 127
        return jnp.round(x / step) * step

    def divergence(model: Model, want: Model) -> float:
        """Mean KL (nats) from `want` to `model` with int8 kernels."""
        int8 = Model(model.config, trees.map_with_names(rounded, model.params))
        p, q = (jax.nn.log_softmax(jnp.asarray(forward(m, TOKENS)) / 8) for m in (want, int8))
        return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1)))

    fused = trained_like(std=0.004, tie_word_embeddings=False)
    base: Any = unfuse(fused)[0]
    ours, chosen = divergence(base, base), choose_eps_z(fused, "bfloat16")
    found = {
        eps: divergence(as_stock(fused, eps, tmp_path / "out"), fused)
        for eps in (chosen, 0.0625, 2.0**-10)
    }
    assert chosen >= 0.0625 and 0 < found[chosen] < 2 * ours and found[0.0625] < 2 * ours
    assert found[2.0**-10] > 20 * ours, (ours, chosen, found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_joint_norm_changes_the_model_at_step_0(tied: bool) -> None:
    """At step 0 the state is written and not yet read. Our norm leaves the base's function as it
    is; counting the state in the mean square would not.
    """
    model = tiny_model(num_layers=3, tie_word_embeddings=tied)
    want = logits(model)
    fused = fuse(model, MINIMAL, init_adapters(jax.random.key(0), model, MINIMAL))
    d, wide = fused.config.norm_dim, fused.config.hidden_size
    share, state = d / wide, wide - d
    tables = {"embed/embedding": ((0, 0), (0, state)), "lm_head/kernel": ((0, state), (0, 0))}

    def error(model: Model) -> float:
        return float(np.abs(logits(model) - want).max() / np.abs(want).max())

    def widened(name: str, x: jax.Array) -> jax.Array:
        """The leaf of an ordinary model of this width, with its gains as stock form has them."""
        if name.endswith("scale"):
            return x * math.sqrt(share)
        return jnp.pad(x, tables[name]) if name in tables else x

    def silent(name: str, x: jax.Array) -> jax.Array:
        written = name.endswith(("o/kernel", "down/kernel"))
        return x.at[..., d:].set(0) if written else x

    joint = trees.map_with_names(widened, fused.params)
    eps = fused.config.rms_norm_eps * share
    config = fused.config.replace(base_hidden_size=None, rms_norm_eps=eps)
    assert error(fused) <= TOLERANCE
    assert error(Model(config, joint)) > 0.01
    assert error(Model(config, trees.map_with_names(silent, joint))) <= TOLERANCE
