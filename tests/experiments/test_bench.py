"""Benchmarks: turns and ratios on a clock of our own, what is counted, and the whole of both on a
tiny model beside transformers and PEFT.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.grids import always
from support.models import tiny_model

from zflora_jax.adapters.methods import fused_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.bench import contenders, latency, peft, timing, training, training_step
from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.presets import preset
from zflora_jax.nn.llama import random_model
from zflora_jax.reporting.provenance import environment


class Clock:
    """Time that passes only where a contender says so; the speed of the machine halves after every
    turn.
    """

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[tuple[str, int]]()

    def contender(self, label: str, prefill: float, token: float) -> timing.Contender:
        def generate(count: int) -> None:
            slow = 2.0 ** max(0, (len(self.calls) - 4) // 4)  # four calls warm up, four are a turn
            self.calls.append((label, count))
            self.now += slow * (prefill + count * token)

        return timing.Contender(generate)


def test_turns_alternate_and_ratios_are_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    both = {"a": clock.contender("a", 0.1, 0.01), "b": clock.contender("b", 0.2, 0.03)}
    turns = timing.decode_turns(both, new_tokens=5, repeats=3)
    assert [label for label, _ in clock.calls] == list("aabb" + "aabb" + "bbaa" + "aabb")
    assert [count for _, count in clock.calls] == [1, 5] * 8
    np.testing.assert_allclose(turns["a"]["tpot_ms"], [10, 20, 40])
    np.testing.assert_allclose(turns["a"]["ttft_ms"], [110, 220, 440])
    assert timing.ratio(turns["b"]["tpot_ms"], turns["a"]["tpot_ms"]) == pytest.approx(3.0)
    assert timing.summary(turns["a"]["tpot_ms"], "x") == pytest.approx(
        {"x": 20, "x_min": 10, "x_max": 40}
    )


def test_the_floor_is_measured_beside_every_contender_whose_bytes_are_known() -> None:
    quick = timing.Contender(lambda count: None, read_bytes=6_000_000)
    rates = iter([1e9, 2e9, 3e9])
    turns = timing.decode_turns(
        {"a": quick, "b": timing.Contender(lambda count: None)}, 2, 3, lambda: next(rates)
    )
    assert turns["a"]["floor_ms"] == [6.0, 3.0, 2.0] and "floor_ms" not in turns["b"]
    assert next(rates, None) is None
    assert timing.bandwidth_meter(size=2**22, repeats=1)() > 1e6


def test_bytes_read_are_those_of_all_weights_but_the_lookup() -> None:
    for tied in (True, False):
        model = pack_for_decode(tiny_model(tie_word_embeddings=tied))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
        config = model.config
        cache = 2 * 3 * config.num_layers * config.num_kv_heads * config.head_dim * 10 * 4
        lookup = 0 if tied else config.vocab_size * config.hidden_size * 4
        assert (
            contenders.read_bytes({"params": model.params}, config, 3, 10)
            == weights - lookup + cache
        )


def test_random_packed_has_the_shapes_of_a_packed_fused_model() -> None:
    model = tiny_model()
    config = fused_config(model.config, AdapterConfig("zflora-uniform", rank=8))

    want = pack_for_decode(random_model(config, jax.random.key(0)))
    found = contenders.random_packed(config, "bfloat16")
    assert jax.tree.map(lambda leaf: leaf.shape, found.params) == jax.tree.map(
        lambda leaf: leaf.shape, want.params
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found.params)} == {
        "bfloat16"
    } and found.config.execution.dtype == "bfloat16"


@pytest.mark.soak
@pytest.mark.parametrize("real", [False, True])
def test_latency_table(real: bool, tmp_path: Path) -> None:
    """The cheaper twin is the command's table, which the next test reads."""
    source = tiny_model() if real else preset("tiny")
    result = latency.measure(
        source,
        methods=["lora", "zflora-minimal", "zflora-uniform"],
        ranks=(4, 8),
        batches=(1,) if real else (1, 2),
        prompts=(8,),
        new_tokens=4,
        repeats=2,
        say=lambda _: None,
    )
    rows, cases = result["rows"], [(4, 1, 8), (8, 1, 8)] + [(4, 2, 8)] * (not real)
    assert [(r["rank"], r["batch"], r["prompt"]) for r in rows[:: len(rows) // len(cases)]] == cases
    labels = [
        "base",
        "lora un-merged",
        "lora merged",
        "zflora-minimal",
        "zflora-minimal idle",
        "zflora-uniform",
    ]
    assert [r["label"] for r in rows] == labels * len(cases)
    size = {(r["label"], r["rank"]): r["bytes_ratio"] for r in rows if r["batch"] == 1}
    assert size["base", 4] == size["lora merged", 8] == 1.0
    assert 1 < size["zflora-minimal", 4] < size["zflora-minimal", 8] < size["zflora-uniform", 8]
    assert not real or size["zflora-minimal", 8] == size["zflora-minimal idle", 8]
    assert all(
        r["ttft_ms_min"] <= r["ttft_ms"] <= r["ttft_ms_max"] and r["compile_s"] >= 0 for r in rows
    )
    result |= {
        "settings": {
            "model": "tiny",
            "weights": "random",
            "dtype": "float32",
            "new_tokens": 4,
            "repeats": 2,
        },
        "environment": environment(),
    }
    latency.write(result, tmp_path / "latency-1.5b", "Latency")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"latency-1.5b{end}"
        for end in (".json", ".md", "-ratio.png", "-ratio.svg", "-rank.png", "-rank.svg")
    }
    assert json.loads((tmp_path / "latency-1.5b.json").read_text())["rows"] == json.loads(
        json.dumps(rows)
    )


def test_latency_by_command_beside_transformers_and_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_meter = timing.bandwidth_meter(size=2**22, repeats=1)
    monkeypatch.setattr(latency, "bandwidth_meter", lambda: small_meter)
    small = ["--model", "tiny", "--repeats", "2", "--out", str(tmp_path / "latency")]
    shape = ["--methods", "zflora-minimal", "--prompts", "8", "--new-tokens", "3", "--baselines"]
    assert main(["bench", "latency", *small, *shape]) == 0
    rows = {r["label"]: r for r in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert rows.keys() >= {
        "base",
        "zflora-minimal",
        "transformers",
        "transformers + PEFT lora",
        "transformers + PEFT idle",
    }
    assert rows["base"]["bytes_ratio"] == 1 < rows["zflora-minimal"]["bytes_ratio"]
    assert all(r["ttft_ms_min"] <= r["ttft_ms"] <= r["ttft_ms_max"] for r in rows.values())
    assert "zflora-minimal" in (tmp_path / "latency.md").read_text()
    assert (tmp_path / "latency-ratio.png").is_file()


@pytest.mark.parametrize(
    ("given", "methods", "masked"),
    always(
        [
            (["--methods", "lora"], ["lora"], ["0.5"]),
            ([], ["lora", "zflora-minimal"], ["0", "0.5"]),
        ],
        lambda case: case[0],
    ),
    ids=str,
)
def test_training_by_command_beside_peft(
    given: list[str],
    methods: list[str],
    masked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`make soak` runs each method and PEFT once in a process of their own, which takes most of the
    time; here one method stands for all.
    """
    if given:
        measured: list[tuple[float, float]] = []

        def alone(case: training.Case, label: str, directory: str) -> tuple[float, float]:
            if not measured:
                measured.append(training_step.alone(case, label, directory))
            return measured[0]

        monkeypatch.setattr(training, "alone", alone)
    small = ["--model", "tiny", "--repeats", "2", "--out", str(tmp_path / "train")]
    case = ["--batch", "2", "--length", "16", "--masked", *masked, *given]
    assert main(["bench", "train", *small, *case]) == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [*methods, "PEFT lora"] * len(masked)
    assert all(row["step_ratio"] == 1.0 for row in rows if row["label"] == "PEFT lora")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert all(1e8 < row["peak_bytes"] < most and row["first_step_s"] > 0 for row in rows)
    losses = [row["loss"] for row in rows if row["label"] in ("lora", "PEFT lora")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(masked) == 1 or losses[0] != losses[2]
    assert (tmp_path / "train.png").is_file() and "x PEFT" in (tmp_path / "train.md").read_text()


def test_training_beside_a_quantised_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(training, "alone", lambda *_: (1e8, 1.0))
    small = ["--model", "tiny", "--repeats", "1", "--out", str(tmp_path / "train"), "--no-peft"]
    case = ["--batch", "2", "--length", "16", "--masked", "0", "--quantize", "none", "int8"]
    assert main(["bench", "train", *small, *case, "--methods", "zflora-minimal"]) == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "train.json").read_text())["rows"]
    numbers, codes = (row["loss"] for row in rows)
    assert [row["case"]["quantize"] for row in rows] == ["none", "int8"]
    assert codes != numbers and codes == pytest.approx(numbers, rel=0.01)
    page = (tmp_path / "train.md").read_text()
    assert "| numbers |" in page and "| int8 |" in page
    # PEFT may be there for some kinds alone.
    found = json.loads((tmp_path / "train.json").read_text())
    found["rows"] = [row | {"case": training.Case(**row["case"])} for row in found["rows"]]
    found["rows"][0]["step_ratio"] = 1.1
    training.write(found, tmp_path / "one", "one ratio")
    assert (tmp_path / "one.png").is_file() and "1.100" in (tmp_path / "one.md").read_text()


def test_masks_leave_the_share_that_was_asked_for() -> None:
    for masked, wanted in ((0.0, 99), (0.5, 50), (0.8, 20), (0.999, 1)):
        mask = training.Case("tiny", length=100, batch=2, masked=masked).batch_arrays(50)[
            "loss_mask"
        ]
        assert mask.sum(axis=1).tolist() == [wanted] * 2


REFUSED = """Traceback (most recent call last):
  File "<string>", line 4, in <module>
jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.
--------------------
For simplicity, JAX has removed its internal frames from the traceback.
"""


def test_a_case_that_does_not_fit_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "matmul_rate", lambda dtype: 1e11)
    cases = [training.Case("tiny", batch=batch, length=16) for batch in (1, 99, 2)]

    def process(command: Any, input: str, **_: Any) -> Any:
        asked = json.loads(input)
        batch, label = asked["case"]["batch"], asked["label"]
        if batch < 99 and (batch, label) != (2, "full"):
            return SimpleNamespace(returncode=0, stdout="[1e8, 1.0]")
        return SimpleNamespace(returncode=1, stderr=REFUSED if label == "full" else "")

    monkeypatch.setattr(training_step, "subprocess", SimpleNamespace(run=process))
    said: list[str] = []
    settings: dict[str, Any] = {"repeats": 1, "with_peft": False, "say": said.append}
    found = training.measure(cases, ["lora", "full"], **settings)
    measured = [(row["case"].batch, row["label"]) for row in found["rows"]]
    assert measured == [(1, "lora"), (1, "full"), (2, "lora")]
    full = "full ended with 1 in a process of its own: jax.errors.JaxRuntimeError:"
    full += " RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    lora = "lora ended with 1 in a process of its own: it printed nothing"
    assert found["failed"] == [f"{cases[1]}: {lora}", f"{cases[1]}: {full}", f"{cases[2]}: {full}"]
    assert [line for line in said if "ended with" in line] == found["failed"]
    page = training.page(found | {"environment": environment()}, "training")
    assert f"Not measured: {found['failed'][1]}" in page
    with pytest.raises(ConfigError, match=r"(?s)nothing could be measured.*RESOURCE_EXHAUSTED"):
        training.measure(cases[1:2], ["full"], **settings)


def test_a_step_that_fails_beside_others_leaves_the_other_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each alone has room, all in one process have not."""
    monkeypatch.setattr(training, "matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(training, "alone", lambda *_: (1e8, 1.0))
    step = training.our_step

    def our_step(case: training.Case, *given: Any) -> Any:
        if case.batch == 99:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nand more")
        return step(case, *given)

    monkeypatch.setattr(training, "our_step", our_step)
    cases = [training.Case("tiny", batch=batch, length=16) for batch in (99, 1)]
    found = training.measure(cases, ["lora"], repeats=1, with_peft=False, say=lambda _: None)
    assert [row["case"].batch for row in found["rows"]] == [1]
    assert found["failed"] == [f"{cases[0]}: RESOURCE_EXHAUSTED: no room"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: latency.measure(preset("tiny"), ranks=()), r"ranks=\[\]: give at least one"),
        (
            lambda: latency.measure(preset("tiny"), new_tokens=1),
            r"new_tokens=1: TPOT needs at least 2",
        ),
        (lambda: latency.measure(preset("tiny"), repeats=0), r"repeats=0: must be at least 1"),
        (
            lambda: latency.measure(preset("tiny"), methods=("full",)),
            r"methods \['full'\] cannot be .*choose from lora",
        ),
        (
            lambda: latency.measure(preset("tiny"), prompts=(500,)),
            r"prompts of 500 and 32 new tokens exceed the model's context of 512",
        ),
        (
            lambda: training.Case("tiny", length=1),
            r"length=1: must be at least 2",
        ),
        (
            lambda: training.Case("tiny", masked=1.0),
            r"masked=1.0: a share of the positions, at least 0 and below 1",
        ),
        (
            lambda: training.Case("tiny", quantize="keep"),
            r"quantize=keep: Allowed: int4, int8",
        ),
        (
            lambda: peft.quantization(training.Case("tiny", quantize="int4")),
            r"bitsandbytes has no int4: compare int8, nf4",
        ),
        (
            lambda: training.measure([training.Case("tiny")], ["lorra"]),
            r"methods=\['lorra'\]: choose from lora",
        ),
        (
            lambda: training.measure([training.Case("tiny", length=1000)], ["lora"]),
            r"length=1000 exceeds the context of 512",
        ),
    ],
)
def test_wrong_settings(run: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run()
