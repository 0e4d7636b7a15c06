"""Adapters that are put into a quantised base, and ways to deploy an adapter on one."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.grids import always
from support.models import tiny_model
from support.quantized import moved, quantized_tiny

import zflora_jax as zf
from studies import deployment, pages, quantised_methods
from studies.deployment import Trained, gptq
from studies.records import write_lines
from studies.run import run_study
from studies.study import BASE, Study, studies
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS

TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12))
LORA = zf.AdapterConfig("lora", rank=4)
CASES = [*(f"{method}-q4_1" for method in quantised_methods.METHODS), "scales-int4"]


@pytest.fixture(scope="module", autouse=True)
def own_methods(the_methods_of_the_package):
    for name, kernel in quantised_methods.METHODS.items():
        zf.add_method(name, kernel)


def exactly_stored(kind: str) -> zf.Model:
    """A quantised base with float32 scales, in which nothing that is trained is rounded."""
    base, half = quantized_tiny(kind), (jnp.float16, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype("float32") if x.dtype in half else x, base.params)
    return dataclasses.replace(base, params=wide)


def logits(model: zf.Model, *adapted: object) -> np.ndarray:
    return np.asarray(zf.forward(model, TOKENS, *adapted))


@pytest.mark.parametrize("case", always(CASES, ("qa-lora-q4_1", "scales-int4").__contains__))
def test_a_method_of_a_quantised_base_is_fused_as_it_was_trained(case):
    method, _, kind = case.rpartition("-")
    base, adapter = exactly_stored(kind), zf.AdapterConfig(method, rank=4)
    start = zf.init_adapters(jax.random.key(0), base, adapter)
    np.testing.assert_allclose(logits(base, adapter, start), logits(base), atol=2e-5)
    adapters = jax.tree.map(lambda x: 0.3 * x, moved(base, adapter))
    wanted, fused = logits(base, adapter, adapters), zf.fuse(base, adapter, adapters)
    assert np.abs(wanted - logits(base)).max() > 0.05
    np.testing.assert_allclose(logits(fused), wanted, atol=1e-4)
    old, new = (trees.flatten(m.params)["layers/mlp/up/kernel"] for m in (base, fused))
    same = [np.array_equal(getattr(old, x), getattr(new, x)) for x in ("codes", "scales", "mins")]
    changed = {"qa-lora": [1, 1, 0], "scales": [1, 0, 1], "scales-minima": [1, 0, 0]}
    assert same == changed.get(method, [0, 0, 0])


def test_deployments_are_the_numbers_of_what_is_stored():
    base = quantized_tiny("q4_1")
    trained = Trained(zf.RunConfig(adapter=LORA), base, moved(base, LORA))
    exact = deployment.exact(trained)
    np.testing.assert_allclose(logits(exact), logits(base, LORA, trained.adapters), atol=1e-4)

    def error(deploy, exact):
        found = deploy(trained)
        return np.abs(logits(found.model) - logits(exact)).max(), found.nbytes

    here, there = error(deployment.in_bfloat16, exact), error(deployment.rounded, exact)
    kernels = [x for _, x in deployment._leaves(base.params) if hasattr(x, "codes") and x.ndim > 2]
    assert 0 < here[0] < there[0] / 10 and there[1] == deployment.nbytes(base.params)
    assert here[1] - there[1] == sum(2 * x.codes.size - x.nbytes for x in kernels)
    assert deployment.update_in_steps(base, exact) > 0.1

    wide = zf.AdapterConfig("zflora-minimal", rank=32)
    trained = trained._replace(run=zf.RunConfig(adapter=wide), adapters=moved(base, wide))
    exact = deployment.exact(trained)
    four, eight = error(deployment.in_codes, exact), error(deployment.in_eight_bits, exact)
    assert 0 < eight[0] < four[0] / 4
    assert deployment.nbytes(base.params) < four[1] < error(deployment.unmerged, exact)[1]
    assert deployment.update_in_steps(base, exact) is None


def test_gram_matrices_are_those_of_the_kernels_inputs():
    model = tiny_model(num_layers=2)
    found = deployment.grams(model, TOKENS)
    table = trees.flatten(model.params)
    x = np.asarray(table["embed/embedding"])[TOKENS].reshape(-1, model.config.hidden_size)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    x = x * np.asarray(table["layers/attn_norm/scale"])[0]
    np.testing.assert_allclose(found["layers/attn/q/kernel"][0], x.T @ x, rtol=2e-4, atol=2e-4)
    assert found["layers/mlp/down/kernel"].shape == (2, 96, 96)


def test_gptq_moves_the_error_of_an_input_to_later_ones():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 8)) @ draw.normal(size=(8, 64)) + 0.3 * draw.normal(size=(400, 64))
    w = draw.normal(size=(64, 24)).astype(np.float32)
    gram, none = (x.T @ x).astype(np.float32), np.eye(64, dtype=np.float32)
    for kind, group in (("q4_1", 32), ("int4", 64)):
        rounded = gptq(w, none, kind, group)
        error = [np.square(x @ (w - q)).sum() for q in (gptq(w, gram, kind, group), rounded)]
        assert error[0] < 0.5 * error[1]
    w = quantised(w)
    assert np.mean(np.abs(gptq(w, none, "q4_1", 32) - w) > 1e-3) < 0.01  # halves, ties
    grid = np.full_like(w, 0.1), np.full_like(w, -0.7)
    found = gptq(w, gram, "q4_1", 32, grid=grid)
    np.testing.assert_allclose(found, np.clip(np.round(found / 0.1), -7, 8) * 0.1, atol=1e-6)
    with pytest.raises(zf.ConfigError, match="not for nf4"):
        gptq(w, gram, "nf4", 32)


def quantised(w: np.ndarray) -> np.ndarray:
    from zflora_jax.ops.quantized import quantize

    found, wanted = (
        quantised_methods.requantised(jnp.asarray(w), x) if made else x
        for x in [quantize(jnp.asarray(w), "q4_1")]
        for made in (True, False)
    )
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=1e-5)
    return np.asarray(wanted.astype(jnp.float32))


def test_a_study_scores_deployments_of_each_seed(two_steps, tmp_path):
    model = tiny_model(head_dim=32, num_layers=1, max_position_embeddings=512)
    model.tokenizer = byte_tokenizer()
    zf.save_hf(tmp_path / "m", model)
    changes = {"model": str(tmp_path / "m"), "quantize.kernels": "q4_1", "data.packing": True}
    study = Study(
        "tiny",
        zf.override(two_steps, changes),
        {"lora": LORA},
        (1e-2,),
        (0,),
        tasks=("arc_easy",),
        scoring=zf.EvalConfig(limit=None, batch_size=4, loss=False, generate=False),
        measure="likelihood_sum",
        reference="lora beside",
        margin=3.0,
        deployments={
            "lora beside": ("lora", deployment.unmerged),
            "lora rounded": ("lora", deployment.rounded),
        },
    )
    zf.atomic_write(tmp_path / "w/base/eval/summary-test-chosen.json", b'{"origin": {}}')
    table = run_study(study, tmp_path / "w", tmp_path / "r", console=False)
    assert table.labels == list(study.deployments) and len(table.runs) == 1 + 1 + 2
    kl = {label: table.chosen[label][0]["result"]["kl"] for label in table.labels}
    assert kl["lora beside"] == 0 < kl["lora rounded"]
    assert BASE in table.differences and table.results("lora rounded")["test_loss"].notna().all()
    write_lines(tmp_path / "r" / "tiny.jsonl.gz", table.runs.values())
    page = pages.pages([study], tmp_path / "r", tmp_path)["tiny"]
    rows = {row[1].strip(): row for line in page.splitlines() if len(row := line.split("|")) > 9}
    base, beside, rounded = (rows[label] for label in (BASE, *table.labels))
    assert float(beside[8]) == 100 and float(rounded[9]) == pytest.approx(kl["lora rounded"], 0.1)
    assert float(base[7]) > float(beside[7]) == float(beside[6]) and base[6].strip() == "-"
    assert "Learning rates" in page and (tmp_path / "tiny.png").exists()
    assert [x[-1] for x in pages.deployed_points(table).values()] == [False, True, False]
    with pytest.raises(zf.ConfigError, match="are no labels of its methods"):
        dataclasses.replace(study, reference="lora")


@pytest.mark.parametrize("method", ["louder-units", "down-writes"])
def test_a_change_of_zflora_minimal_is_fused_as_it_was_trained(method):
    studies("minimal")  # adds both
    model, adapter = tiny_model(), zf.AdapterConfig(method, rank=4, extra_mlp_units=4)
    adapters = moved(model, adapter)
    wanted, fused = logits(model, adapter, adapters), zf.fuse(model, adapter, adapters)
    np.testing.assert_allclose(logits(fused), wanted, atol=2e-5)
    base, back = zf.unfuse(fused)
    np.testing.assert_array_equal(logits(base), logits(model))
    np.testing.assert_allclose(logits(model, adapter, back), wanted, atol=2e-5)
    whole = moved(model, minimal := adapter.replace(method="zflora-minimal"))
    assert np.abs(logits(model, minimal, whole) - wanted).max() > 1e-3
    assert ("o" in adapters["layers"]["attn"]) == (method == "louder-units")
    assert "cross" not in moved(model, zf.AdapterConfig(method))["layers"]["mlp"]["gate"]


def test_wrong_methods_of_ones_own_are_refused(tmp_path):
    base, adapter = quantized_tiny("q4_1"), zf.AdapterConfig("scales")
    adapters = moved(base, adapter)
    ways = (
        (base, {"adapter": adapter, "adapters": adapters}),
        (zf.fuse(base, adapter, adapters), {}),
    )
    answers = [zf.generate_tokens(m, TOKENS.tolist(), max_new_tokens=4, **x) for m, x in ways]
    assert answers[0] == answers[1]

    class Other(zf.LowRank):
        shapes = property(lambda self: {"gate": (1,)})

    half = type("Half", (zf.LowRank,), {"added": lambda self, blocks, x: x})
    wide = type("Wide", (zf.Widening,), {"fuse": lambda self, kernel, blocks, write: kernel})
    for name, wrong, message in (
        ("scales", dict, "a class that extends zf.LowRank or zf.Widening"),
        ("scales", Other, "another name"),
        ("half", half, r"belong together, and one of them is LowRank's\. Define both"),
        ("half", wide, r"one of them is Widening's"),
    ):
        with pytest.raises(zf.ConfigError, match=message):
            zf.add_method(name, wrong)
    zf.add_method("other", Other)
    with pytest.raises(zf.ConfigError, match="has blocks gate: call them lora_a"):
        zf.init_adapters(jax.random.key(0), base, zf.AdapterConfig("other"))
    plain = zf.dequantize_model(base)
    zf.add_method("mine", type("Mine", (zf.LowRank,), {}))
    mine = zf.AdapterConfig("mine", rank=4)
    with pytest.raises(zf.ConfigError, match="rounded a second time"):
        zf.fuse(base, mine, moved(base, mine))
    zf.save_hf(tmp_path / "x", zf.fuse(plain, mine, moved(plain, mine)))
    METHODS.pop("mine")
    with pytest.raises(zf.CheckpointError, match="'mine', which this process does not have"):
        zf.load_model(tmp_path / "x")
