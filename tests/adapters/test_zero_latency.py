"""Zero latency as a property of compiled programs: a token of a fused model runs the kernels of a
token of the base. Compiled for a TPU, not run; docs/results.md has GPUs and more sizes.
"""

import functools
from typing import Any

import pytest
from decode_programs import DecodeCase, loop_row
from support.grids import always
from support.needs import needs_libtpu

from zflora_jax import AdapterConfig, LlamaConfig, preset
from zflora_jax.parallel.targets import target

pytestmark = needs_libtpu

# Two layers with heads of 64 and grouped queries, as Llama-3.2-1B has them, and narrow streams.
CONFIG = preset("llama-3.2-1b").replace(
    num_layers=2,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=2,
    vocab_size=4096,
)
BIASED = CONFIG.replace(family="qwen2")  # a llama that adds biases to q, k and v


@functools.cache
def row(
    adapter: AdapterConfig | None, chip: str, batch: int, config: LlamaConfig = BIASED
) -> dict[str, Any]:
    case = DecodeCase(config, adapter, batch, prompt=128, new_tokens=64)
    return loop_row(case, target(f"tpu:{chip}:1x1"))


@pytest.mark.parametrize(
    ("family", "method", "rank", "chip", "batch"),
    always(
        [
            ("qwen2", "zflora-minimal", 32, "v5e", 1),
            ("qwen2", "zflora-uniform", 128, "v5e", 1),
            ("llama", "ffba", 16, "v5e", 1),
            ("llama", "zflora-minimal", 8, "v5e", 8),
            ("llama", "zflora-minimal", 128, "v6e", 1),
            ("llama", "zflora-uniform", 16, "v6e", 8),
            ("qwen3", "zflora-uniform", 32, "v5e", 1),
            ("smollm3", "zflora-uniform", 32, "v5e", 1),
        ],
        lambda case: case[:2] == ("qwen2", "zflora-minimal"),
    ),
)
def test_a_fused_token_runs_the_kernels_of_the_base(
    family: str, method: str, rank: int, chip: str, batch: int
) -> None:
    """At most 2% more operations, no larger temporaries, no copy of a kernel, table or cache, and
    once a call no more of them than the base makes; whatever biases, norms of heads and layers
    without RoPE a family has.
    """
    config = CONFIG.replace(family=family, nope_layers=(1,) if family == "smollm3" else ())
    fused = row(AdapterConfig(method, rank=rank), chip, batch, config)
    base = row(None, chip, batch, config)
    assert base["copies"] == fused["copies"] == 0
    assert fused["call_copies"] <= base["call_copies"]
    assert fused["kernels"] <= 1.02 * base["kernels"]
    assert fused["temporaries"] <= base["temporaries"] + 2**20  # widths and tiles of activations


def test_lora_beside_the_base_does_not() -> None:
    """So the count can tell: at least ten more kernels a layer."""
    base, beside = row(None, "v5e", 1), row(AdapterConfig("lora", rank=32), "v5e", 1)
    assert beside["kernels"] >= base["kernels"] + 10 * CONFIG.num_layers


@pytest.mark.parametrize(("chip", "batch"), [("v5e", 1), ("v6e", 2), ("v5e", 4), ("v6e", 1)])
@pytest.mark.soak  # of the base as of the fused
def test_few_rows_are_multiplied_on_the_matrix_unit(chip: str, batch: int) -> None:
    """On the vector unit a token would take about four times as long as reading the weights."""
    # Its weights take most of a token, and its layer a third of them.
    real = preset("llama-3.2-1b").replace(num_layers=1, vocab_size=65_536)
    found = loop_row(DecodeCase(real, None, batch, 128, 64), target(f"tpu:{chip}:1x1"))
    assert 1 <= found["floor_share"] <= 1.5
    # Of a prompt, too: its 128 rows pass each kernel once, and the head reads one of them.
    assert 1.4 <= found["prefill_share"] <= 2
