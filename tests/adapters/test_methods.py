"""Methods as integers: which kernel gets which blocks, what that costs in parameters, and which
widths devices like.
"""

import pytest

from zflora_jax.adapters.methods import (
    default_extra_head_dim,
    fused_config,
    resolve_adapter,
    target_kernels,
)
from zflora_jax.adapters.packing import packed_config
from zflora_jax.adapters.widths import (
    MULTIPLES,
    count_params,
    round_widths,
    width_advice,
)
from zflora_jax.config import METHODS, AdapterConfig, preset
from zflora_jax.core.architecture import KERNELS, count_base
from zflora_jax.core.fields import ConfigError

F, FB, ALL = ("forward",), ("forward", "backward"), ("forward", "backward", "cross")
B = ("backward",)
TINY = preset("tiny")  # d 64, heads 4/2 of 16, f 96, 2 layers
SMOL, LLAMA = preset("smollm2-135m"), preset("llama-3.2-1b")


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
    ("zflora-minimal", "all"): [B, B, B, F, B, B, F],
    ("zflora-minimal", "attention"): [B, B, B, F, None, None, None],
    ("zflora-minimal", "mlp"): [None, None, None, None, B, B, F],
    ("zflora-minimal", "q|o"): [B, None, None, F, None, None, None],
    ("zflora-minimal", "q|v|down"): [B, None, B, None, None, None, F],
    ("zflora-uniform", "all"): [ALL] * 7,
    ("zflora-uniform", "attention"): [ALL] * 4 + [None] * 3,
    ("zflora-uniform", "mlp"): [None] * 4 + [ALL] * 3,
    # Heads live through v and o alone; q has no k to score with.
    ("zflora-uniform", "q|v|o|gate"): [B, None, ALL, ALL, B, None, None],
}


def blocks_of(method, config=TINY, **changes):
    """Kernel -> the names of its blocks."""
    found = resolve_adapter(config, AdapterConfig(method, **{"rank": 6} | changes)).blocks
    return {kernel: tuple(blocks) for kernel, blocks in found.items()}


@pytest.mark.parametrize(("method", "targets"), TABLE, ids=lambda v: v)
def test_blocks_are_those_of_the_design(method, targets):
    assert {m for m, named in TABLE if named == "all"} == set(METHODS)
    wanted = zip(KERNELS, TABLE[method, targets], strict=True)
    assert blocks_of(method, targets=targets) == {k: names for k, names in wanted if names}


@pytest.mark.parametrize("method", METHODS)
def test_widths_and_their_defaults(method):
    row = METHODS[method]
    widths = (6 * row.residual, 16 * row.heads, 6 * (row.mlp and row.units))
    p = resolve_adapter(TINY, AdapterConfig(method, rank=6))
    assert (p.residual, p.heads, p.mlp) == widths
    fused = fused_config(TINY, AdapterConfig(method, rank=6))
    assert (fused.hidden_size - 64, fused.head_dim - 16, fused.intermediate_size - 96) == widths
    assert (fused.base_width, fused.base_head_width) == (64, 16)
    if row.heads:  # without head_scores only v and o are widened
        full, values = (blocks_of(method, head_scores=s) for s in (True, False))
        read = {"q": B, "k": B} if row.residual else {}
        assert values == {k: v for k, v in full.items() if k not in "qk"} | read


def test_widths_of_zero_switch_a_stream_off():
    found = blocks_of("zflora-uniform", extra_head_dim=0, extra_mlp_units=0)
    assert found == blocks_of("zflora-minimal")
    units = {"q": B, "k": B, "v": B, "o": F, "gate": ALL, "up": ALL, "down": ALL}
    assert blocks_of("zflora-uniform", extra_head_dim=0) == units
    assert blocks_of("zflora-minimal", extra_mlp_units=6) == units


def test_default_head_ranks():
    wanted = {16: 16, 32: 32, 48: 16, 64: 16, 80: 16, 96: 16, 128: 32, 192: 32}
    assert {k: default_extra_head_dim(k) for k in wanted} == wanted
    for config, heads in ((SMOL, 16), (preset("llama-3.1-8b"), 32)):
        assert resolve_adapter(config, AdapterConfig("ffba")).heads == heads
    with pytest.raises(ConfigError, match=r"head_dim=256 has no larger served head size"):
        default_extra_head_dim(256)


@pytest.mark.parametrize(
    ("targets", "kernels"), [("[qv]", "q v"), ("down|q", "q down"), ("(?!q).", "k v o")]
)
def test_targets(targets, kernels):
    assert target_kernels(targets) == tuple(kernels.split())


NO_KERNEL = r"is no regex of kernel names; kernels are q, k, v, o, gate, up, down \(or use 'all'"
LISTS = ("['q_proj', 'v_proj']", "[q_proj,v_proj]", '["q","v"]', "[q, v]", "q,v", "q_proj|v")
NO_REGEX = r"is not a valid regex .* or a regex such as 'q\|v'"
NO_USE = r"(units=8|head_dim=4) changes nothing with .*: (MLP units need|head dims need v and o)"
NOTHING = "leaves method '{}' nothing to widen: "


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        *(("lora", {"targets": t}, NO_KERNEL) for t in ("Q", "", "all|q", "q|dwn", "[down]")),
        *(("lora", {"targets": t}, r"Here that is 'q\|v'.$") for t in LISTS),
        *(("lora", {"targets": t}, NO_REGEX) for t in ("q|(", "*", "q{99999999999}")),
        ("full", {"targets": "mlp"}, r"'full' trains every .*; leave targets at 'all'"),
        ("lora", {"head_scores": False}, r"method 'lora' does not have it"),
        ("zflora-minimal", {"targets": "attention", "extra_mlp_units": 8}, NO_USE),
        ("ffba", {"targets": "mlp", "extra_head_dim": 4}, NO_USE),
        ("zflora-minimal", {"targets": "q|k|v"}, NOTHING),  # the state is read but never written
        ("zflora-minimal", {"targets": "o|down"}, NOTHING),  # written but never read
        ("ffba", {"targets": "q|v"}, NOTHING),
        ("ffba", {"targets": "gate|up"}, NOTHING),
        ("ffba", {"targets": "q|k", "head_scores": False}, NOTHING),
        ("ffba", {"extra_head_dim": 0, "extra_mlp_units": 0}, NOTHING),
    ],
)
def test_settings_that_select_or_change_nothing(method, changes, message):
    """A message about streams names those that the method widens, and no other."""
    with pytest.raises(ConfigError, match=message.format(method)) as error:
        resolve_adapter(TINY, AdapterConfig(method, **changes))
    row, said = METHODS[method], str(error.value)
    if message == NOTHING:
        assert [
            "the residual state needs o or down and one of" in said,
            "head dims need v and o, or q and k with head_scores, and extra_head_dim" in said,
            "MLP units need gate, up and down, and extra_mlp_units" in said,
        ] == [row.residual, row.heads, row.mlp]


# --- counts and budgets ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (AdapterConfig("lora", rank=16), 4_884_480),
        (AdapterConfig("zflora-minimal", rank=18, extra_mlp_units=24), 4_600_800 - 45_360),  # dead
        (AdapterConfig("ffba", extra_head_dim=8, extra_mlp_units=32), 4_976_640),
        (AdapterConfig("full"), 134_515_008),
    ],
    ids=lambda v: v.method if isinstance(v, AdapterConfig) else str(v),
)
def test_published_counts_of_smollm2_135m(adapter, count):
    assert count_params(SMOL, adapter) == count


@pytest.mark.parametrize(
    ("name", "count"), [("llama-3.2-1b", 1_235_814_400), ("llama-2-7b", 6_738_415_616)]
)
def test_base_counts_are_the_published_ones(name, count):
    assert count_base(preset(name)) == count


# --- widths that devices like --------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", MULTIPLES)
@pytest.mark.parametrize("method", METHODS)
def test_rounded_widths_need_no_filling(method, kind, use_rslora):
    """Nor do they need rounding again; the scale and the heads stay."""
    adapter = AdapterConfig(method, rank=20, alpha=30.0, use_rslora=use_rslora)
    better = round_widths(LLAMA, adapter, kind)
    if not METHODS[method].widens:
        assert better is adapter
        return
    packed = packed_config(fused_config(LLAMA, better), kind, better)
    assert packed.execution.fill_residual == packed.execution.fill_mlp == 0
    again = round_widths(LLAMA, better, kind)
    assert again.replace(alpha=better.alpha) == better
    for found in (better, again):
        assert found.scale == pytest.approx(adapter.scale, rel=1e-12)
    assert fused_config(LLAMA, better).head_dim == fused_config(LLAMA, adapter).head_dim
    before = packed_config(fused_config(LLAMA, adapter), kind, adapter)
    assert (packed.hidden_size, packed.intermediate_size) == (
        before.stored.hidden_size,
        before.stored.intermediate_size,
    ), "the rounded adapter fills what would be zeros, and no more"


def test_the_advice_names_the_numbers():
    minimal = AdapterConfig("zflora-minimal", rank=32, alpha=64.0)
    advice = width_advice(LLAMA, minimal.replace(extra_mlp_units=32))
    assert [text.split()[4] for text in advice.values()] == ["1.015", "1.023", "1.060"]
    assert "adapter" not in advice["cpu"] and "; adapter.extra_mlp_units=128 tr" in advice["gpu"]
    assert "adapter.rank=128 adapter.alpha=256 adapter.extra_mlp_units=128" in advice["tpu"]
    untied = width_advice(preset("llama-2-7b"), minimal).values()
    assert [text.split()[4] for text in untied] == ["1.008", "1.008", "1.031"]
    assert width_advice(LLAMA, AdapterConfig("lora", rank=5)) == {}
    with pytest.raises(ConfigError, match=r"device type 'npu': .*Allowed: cpu, gpu, tpu"):
        round_widths(LLAMA, minimal, "npu")
