"""Decode reads codes: the compiled token loop writes no kernel's numbers. On this CPU; of a TPU the
compiled text is read, nothing runs.
"""

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from decode_programs import DecodeCase, loop_row
from program_text import Program
from support.checks import compiled
from support.grids import always
from support.models import tiny_model
from support.quantized import moved, quantized_tiny

from zflora_jax import AdapterConfig, fuse, pack_for_decode, preset, quantize_model
from zflora_jax.core import trees
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.ops.quantized import KINDS, QuantizedArray
from zflora_jax.parallel.targets import target

MINIMAL = AdapterConfig("zflora-minimal", rank=16)


def program_of(kind: str, adapter: AdapterConfig | None) -> tuple[Any, int]:
    """The compiled program of a packed model on this CPU, and how many bytes its kernels' numbers
    would take.
    """
    model = tiny_model(hidden_size=256, intermediate_size=1024, num_heads=4, head_dim=64)
    model = quantize_model(model, QuantizeConfig(kind))
    if adapter is not None:
        model = fuse(model, adapter, moved(model, adapter))
    packed = pack_for_decode(model, "cpu")
    given = (
        {"params": packed.params},
        jnp.zeros((1, 16), jnp.int32),
        jnp.ones((1, 16), bool),
        jax.random.split(jax.random.key(0), 1),
    )
    step = compiled(DecodeProgram.decode.lower(DecodeProgram(packed.config), *given, 16))
    flat = trees.flatten(packed.params).items()
    numbers = sum(4 * math.prod(leaf.shape) for name, leaf in flat if name.endswith("kernel"))
    return step, numbers


@pytest.mark.parametrize(("kind", "adapter"), [("int8", None), ("int8", MINIMAL)])
@pytest.mark.soak  # of memory
def test_a_program_on_a_cpu_holds_the_numbers_of_one_kernel_at_most(kind, adapter):
    """Prefill dequantises one kernel at a time, and the loop of tokens reads codes."""
    step, numbers = program_of(kind, adapter)
    assert step.memory_analysis().temp_size_in_bytes < 0.4 * numbers  # gate|up: a third
    loop = Program(step.as_text()).loop("decode_until)/while")
    whole = max(op.elements for op in loop if op.code == "fusion")
    assert whole <= numbers / 4 / 4


@pytest.mark.parametrize("kind", always(KINDS, ("int8", "q4_1").__contains__))
def test_a_cpu_keeps_the_codes_of_int8_alone(kind):
    """Other codes are slower there than floats; GPUs and TPUs keep them, with their scales."""
    model = quantized_tiny(kind)
    for device in ("cpu", "gpu", "tpu"):
        leaves = trees.flatten(pack_for_decode(model, device).params).values()
        codes = [leaf for leaf in leaves if isinstance(leaf, QuantizedArray)]
        assert bool(codes) == (device != "cpu" or kind == "int8")
        assert {str(leaf.scales.dtype) for leaf in codes} <= {KINDS[kind].scales}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra target-tpu"
)
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "q4_1"])
@pytest.mark.soak  # test_zero_latency has floats
def test_a_token_on_a_tpu_copies_no_kernel(kind):
    config = preset("llama-3.2-1b").replace(
        num_layers=2, hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2
    )
    base, fused = (
        loop_row(
            DecodeCase(config.replace(vocab_size=4096), adapter, quantize=QuantizeConfig(kind)),
            target("tpu:v5e:1x1"),
        )
        for adapter in (None, AdapterConfig("zflora-minimal", rank=32))
    )
    assert base["copies"] == fused["copies"] == 0
    assert fused["kernels"] <= (1.15 if kind == "int8" else 1.03) * base["kernels"]
