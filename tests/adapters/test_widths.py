"""Widths that devices like: rounding, and what a user is told."""

from __future__ import annotations

import pytest

from zflora_jax.adapters.methods import fused_config, resolve_adapter
from zflora_jax.adapters.packing import packed_config
from zflora_jax.adapters.widths import MULTIPLES, round_widths, width_advice
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.presets import preset

BASE = preset("llama-3.2-1b")


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", MULTIPLES)
@pytest.mark.parametrize("method", METHODS)
def test_rounded_widths_need_no_filling(method: str, kind: str, use_rslora: bool) -> None:
    """Nor do they need rounding again; the scale and the heads stay."""
    adapter = AdapterConfig(method, rank=20, alpha=30.0, use_rslora=use_rslora)
    better = round_widths(BASE, adapter, kind)
    if not METHODS[method].widens:
        assert better is adapter
        return
    packed = packed_config(fused_config(BASE, better), kind, better)
    assert packed.execution.fill_residual == packed.execution.fill_mlp == 0
    again = round_widths(BASE, better, kind)
    assert again.replace(alpha=better.alpha) == better
    for found in (better, again):
        assert found.scale == pytest.approx(adapter.scale, rel=1e-12)
    assert fused_config(BASE, better).head_dim == fused_config(BASE, adapter).head_dim
    before = packed_config(fused_config(BASE, adapter), kind, adapter)
    assert (packed.hidden_size, packed.intermediate_size) == (
        before.stored.hidden_size,
        before.stored.intermediate_size,
    ), "the rounded adapter fills what would be zeros, and no more"


def test_the_advice_names_the_numbers() -> None:
    minimal = AdapterConfig("zflora-minimal", rank=32, alpha=64.0)
    advice = width_advice(BASE, minimal)
    assert set(advice) == {"gpu", "tpu"}
    assert "MLP 8224 as 8320" in advice["gpu"] and "adapter.extra_mlp_units=128" in advice["gpu"]
    assert "adapter.rank=128 adapter.alpha=256 adapter.extra_mlp_units=128" in advice["tpu"]
    assert width_advice(BASE, AdapterConfig("zflora-minimal", rank=128)) == {}
    assert width_advice(BASE, AdapterConfig("lora", rank=5)) == {}
    with pytest.raises(ConfigError, match=r"device kind 'npu': .*Allowed: cpu, gpu, tpu"):
        round_widths(BASE, minimal, "npu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "head_scores": False}, r"method 'lora' does not have it"),
        ({"targets": "attention", "extra_mlp_units": 8}, r"extra_mlp_units=8 changes nothing"),
        (
            {"method": "ffba", "targets": "mlp", "extra_head_dim": 4},
            r"extra_head_dim=4 changes nothing with adapter.targets='mlp': head dims need v and o",
        ),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve_adapter(
            preset("smollm2-135m"), AdapterConfig(**{"method": "zflora-minimal"} | changes)
        )
