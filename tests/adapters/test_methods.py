"""Methods as integers: which kernel gets which blocks, what that costs in parameters, and how the
blocks start.
"""

from __future__ import annotations

import pytest

from zflora_jax.adapters.counts import count_params, rank_for_budget
from zflora_jax.adapters.methods import (
    default_extra_head_dim,
    fused_config,
    resolve_adapter,
    target_kernels,
)
from zflora_jax.adapters.shapes import block_shapes
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import KERNELS, count_base
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.presets import PRESETS, preset

F, FB, ALL = ("forward",), ("forward", "backward"), ("forward", "backward", "cross")
B = ("backward",)
TINY = preset("tiny")  # d 64, heads 4/2 of 16, f 96, 2 layers
SMOL = preset("smollm2-135m")
RANKED = [  # the methods whose counts depend on the rank
    m for m, r in METHODS.items() if r.residual or r.mlp or r.in_place in ("lora", "ffa")
]


# docs/method.md: kernel -> blocks, "-" for none, in the order q k v o gate up down.
TABLE = {
    ("lora", "all"): [("lora_a", "lora_b")] * 7,
    ("lora", "attention"): [("lora_a", "lora_b")] * 4 + [None] * 3,
    ("lora", "mlp"): [None] * 4 + [("lora_a", "lora_b")] * 3,
    ("ffa", "all"): [("ffa_a",)] * 7,
    ("ffa", "q|down"): [("ffa_a",), *[None] * 5, ("ffa_a",)],
    ("full", "all"): [None] * 7,
    ("ffba", "all"): [F, F, F, B, F, F, B],
    ("ffba", "attention"): [F, F, F, B, None, None, None],
    ("ffba", "mlp"): [None, None, None, None, F, F, B],
    ("ffba", "v|o"): [None, None, F, B, None, None, None],
    ("ffba", "q|k"): [F, F, None, None, None, None, None],
    ("zflora-minimal", "all"): [B, B, B, F, ALL, ALL, ALL],
    ("zflora-minimal", "attention"): [B, B, B, F, None, None, None],
    ("zflora-minimal", "mlp"): [None, None, None, None, ALL, ALL, ALL],
    ("zflora-minimal", "q|o"): [B, None, None, F, None, None, None],
    # MLP units need gate and up too, so m = 0.
    ("zflora-minimal", "q|v|down"): [B, None, B, None, None, None, F],
    ("zflora-uniform", "all"): [ALL] * 7,
    ("zflora-uniform", "attention"): [ALL] * 4 + [None] * 3,
    ("zflora-uniform", "mlp"): [None] * 4 + [ALL] * 3,
    # Heads live through v and o alone; q has no k to score with.
    ("zflora-uniform", "q|v|o|gate"): [B, None, ALL, ALL, B, None, None],
}


def test_every_method_is_in_the_table():
    assert {method for method, targets in TABLE if targets == "all"} == set(METHODS)


@pytest.mark.parametrize(("method", "targets"), TABLE, ids=lambda v: v)
def test_blocks_are_those_of_the_design(method, targets):
    blocks = resolve_adapter(TINY, AdapterConfig(method, rank=6, targets=targets)).blocks
    assert blocks == {
        k: names for k, names in zip(KERNELS, TABLE[method, targets], strict=True) if names
    }


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.heads])
def test_without_head_scores_v_and_o_alone_are_widened(method):
    full, values = (
        resolve_adapter(TINY, AdapterConfig(method, rank=6, head_scores=s)).blocks
        for s in (True, False)
    )
    read = B if METHODS[method].residual else ()
    assert values.get("q", ()) == values.get("k", ()) == read
    assert {k: v for k, v in values.items() if k not in "qk"} == {
        k: v for k, v in full.items() if k not in "qk"
    }


@pytest.mark.parametrize("method", METHODS)
def test_widths_and_their_defaults(method):
    row = METHODS[method]
    widths = (6 * row.residual, 16 * row.heads, 6 * row.mlp)
    p = resolve_adapter(TINY, AdapterConfig(method, rank=6))
    assert (p.residual, p.heads, p.mlp) == widths
    fused = fused_config(TINY, AdapterConfig(method, rank=6))
    assert (fused.hidden_size - 64, fused.head_dim - 16, fused.intermediate_size - 96) == widths
    assert (fused.norm_dim, fused.rotary_dim) == (64, 16)


def test_widths_of_zero_switch_a_stream_off():
    p = resolve_adapter(
        TINY, AdapterConfig("zflora-uniform", rank=6, extra_head_dim=0, extra_mlp_units=0)
    )
    assert p.blocks == {"q": B, "k": B, "v": B, "o": F, "gate": B, "up": B, "down": F}


def test_default_head_ranks():
    assert {k: default_extra_head_dim(k) for k in (16, 32, 48, 64, 80, 96, 128, 192)} == {
        16: 16,
        32: 32,
        48: 16,
        64: 16,
        80: 16,
        96: 16,
        128: 32,
        192: 32,
    }
    assert (
        resolve_adapter(SMOL, AdapterConfig("ffba")).heads == 16
        and resolve_adapter(preset("llama-3.1-8b"), AdapterConfig("ffba")).heads == 32
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"head_dim=256 has no larger served head size .* set adapter\.extra_head_dim yourself"
        ),
    ):
        default_extra_head_dim(256)


def test_one_layer_shapes():
    shapes = block_shapes(
        TINY, AdapterConfig("zflora-uniform", rank=6, extra_head_dim=8, extra_mlp_units=5)
    )
    assert shapes["q"] == {"forward": (64, 4, 8), "backward": (6, 4, 16), "cross": (6, 4, 8)}
    assert (
        shapes["k"]
        == shapes["v"]
        == {
            "forward": (64, 2, 8),
            "backward": (6, 2, 16),
            "cross": (6, 2, 8),
        }
    )
    assert shapes["o"] == {"forward": (4, 16, 6), "backward": (4, 8, 64), "cross": (4, 8, 6)}
    assert (
        shapes["gate"] == shapes["up"] == {"forward": (64, 5), "backward": (6, 96), "cross": (6, 5)}
    )
    assert shapes["down"] == {"forward": (96, 6), "backward": (5, 64), "cross": (5, 6)}
    assert block_shapes(TINY, AdapterConfig("lora", rank=3))["o"] == {
        "lora_a": (64, 3),
        "lora_b": (3, 64),
    }
    assert block_shapes(TINY, AdapterConfig("ffa", rank=3))["down"] == {"ffa_a": (96, 3)}


# --- targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "kernels"),
    [
        ("all", "q k v o gate up down"),
        ("attention", "q k v o"),
        ("mlp", "gate up down"),
        ("[qv]", "q v"),
        (".*", "q k v o gate up down"),
    ]
    + [("down|q", "q down"), ("(?!q).", "k v o"), ("ga.*", "gate")],
)
def test_targets(targets, kernels):
    assert target_kernels(targets) == tuple(kernels.split())


@pytest.mark.parametrize("targets", ["q_proj", "Q", "", "attn", "al"])
def test_targets_that_match_nothing(targets):
    with pytest.raises(
        ConfigError,
        match=(
            r"matches no kernel; kernels are q, k, v, o, gate, up, down \(or use 'all',"
            r" 'attention', 'mlp'\)"
        ),
    ):
        resolve_adapter(TINY, AdapterConfig("lora", targets=targets))


@pytest.mark.parametrize("targets", ["q|(", "[", "*", "q{99999999999}"])
def test_targets_that_are_no_regex(targets):
    with pytest.raises(ConfigError, match=r"is not a valid regex .* or a regex such as 'q\|v'"):
        resolve_adapter(TINY, AdapterConfig("lora", targets=targets))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("zflora-minimal", {"targets": "q|k|v"}),  # the state is read but never written
        ("zflora-minimal", {"targets": "o|down"}),  # written but never read
        ("zflora-minimal", {"targets": "up"}),
        ("ffba", {"targets": "q|v"}),
        ("ffba", {"targets": "gate|up"}),
        ("ffba", {"targets": "q|k", "head_scores": False}),
        ("ffba", {"extra_head_dim": 0, "extra_mlp_units": 0}),
    ],
)
def test_targets_that_leave_nothing_to_widen(method, changes):
    """The message names the streams that the method widens, and no other."""
    with pytest.raises(ConfigError, match=f"leaves method '{method}' nothing to widen: ") as error:
        resolve_adapter(TINY, AdapterConfig(method, **changes))
    row, message = METHODS[method], str(error.value)
    assert [
        "the residual state needs o or down and one of" in message,
        "head dims need v and o, or q and k with head_scores, and extra_head_dim" in message,
        "MLP units need gate, up and down, and extra_mlp_units" in message,
    ] == [row.residual, row.heads, row.mlp]


def test_full_takes_no_targets():
    with pytest.raises(
        ConfigError,
        match=r"targets='mlp': method 'full' trains every base parameter; leave targets at 'all'",
    ):
        resolve_adapter(TINY, AdapterConfig("full", targets="mlp"))


# --- counts and budgets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (AdapterConfig("lora", rank=16), 4_884_480),
        (
            AdapterConfig("zflora-minimal", rank=18, extra_mlp_units=24),
            4_600_800 - 18 * (576 + 2 * 192) - 18 * (1536 + 24),
        ),
        (AdapterConfig("ffba", extra_head_dim=8, extra_mlp_units=32), 4_976_640),
        (AdapterConfig("full"), 134_515_008),
    ],
    ids=lambda v: v.method if isinstance(v, AdapterConfig) else str(v),
)
def test_published_counts_of_smollm2_135m(adapter, count):
    assert count_params(SMOL, adapter) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ]
    + [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248)],
)
def test_base_counts_are_the_published_ones(name, count):
    assert count_base(preset(name)) == count


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize("name", PRESETS)
def test_rank_for_budget_is_the_nearest_rank(name, method):
    """The budget of LoRA r=16: met within 3%, except where one rank is more than that or the head
    dims alone are above it.
    """
    config, start = preset(name), AdapterConfig(method)
    budget = count_params(config, AdapterConfig("lora", rank=16))
    least = count_params(config, start.replace(rank=1))
    if least > 1.5 * budget:
        with pytest.raises(
            ConfigError,
            match=(
                rf"method '{method}' needs at least {least:,} parameters .* budget of {budget:,}"
                r" cannot be met"
            ),
        ):
            rank_for_budget(config, start, budget)
        return
    found = rank_for_budget(config, start, budget)
    count, step = (
        count_params(config, found),
        count_params(config, found.replace(rank=found.rank + 1)) - count_params(config, found),
    )
    off = abs(count - budget)
    assert found.method == method and found.scale == start.scale
    for rank in {max(1, found.rank - 1), found.rank + 1}:
        assert off <= abs(count_params(config, found.replace(rank=rank)) - budget)
    assert off <= step or found.rank == 1
    if least <= budget and step <= 0.06 * budget:
        assert off <= 0.03 * budget
    if method == "lora":
        assert found.rank == 16


def test_rank_for_budget_keeps_what_was_chosen():
    start = AdapterConfig(
        "zflora-uniform", rank=4, alpha=6.0, extra_head_dim=8, extra_mlp_units=24, targets="all"
    )
    found = rank_for_budget(SMOL, start, 6_000_000)
    assert found == start.replace(rank=found.rank, alpha=1.5 * found.rank)
    assert abs(count_params(SMOL, found) - 6_000_000) <= 0.03 * 6_000_000
    stable = start.replace(use_rslora=True)  # whose alpha is for all ranks
    assert rank_for_budget(SMOL, stable, 6_000_000) == stable.replace(rank=found.rank)


@pytest.mark.parametrize(
    ("adapter", "budget", "message"),
    [
        (AdapterConfig("lora"), 0, r"budget=0: must be at least 1 parameter"),
        (AdapterConfig("full"), 1000, r"method 'full' has no rank"),
        (AdapterConfig("lora"), 10, r"method 'lora' needs at least 1,856 parameters"),
        (
            AdapterConfig("lora"),
            10**8,
            r"method 'lora' reaches no more than [\d,]+ parameters here, whatever its rank",
        ),
        (
            AdapterConfig("ffba", targets="attention"),
            10**6,
            r"method 'ffba' has no rank here: no width depends on it; set extra_head_dim",
        ),
        (AdapterConfig("ffba", extra_mlp_units=8), 10**4, r"method 'ffba' has no rank here"),
    ],
)
def test_budgets_that_cannot_be_met(adapter, budget, message):
    with pytest.raises(ConfigError, match=message):
        rank_for_budget(TINY, adapter, budget)
