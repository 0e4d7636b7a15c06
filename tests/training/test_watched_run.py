"""A run that can be watched: rates of its devices and MFU, the time that no step took, traces."""

import json

import jax
import numpy as np
import pytest
from support.models import tiny_model
from support.runs import quiet_train
from support.sharded import batch

from zflora_jax import ConfigError, count_params, override
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.roofline import batch_flops
from zflora_jax.experiments.train import train
from zflora_jax.parallel.targets import peak_flops
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import hooks, loop


@pytest.mark.parametrize("method", ["zflora-minimal", "full"])
def test_the_operations_of_a_batch_by_hand(method):
    """4N for a frozen base and 6N for a trained one, of real tokens alone, the head of learned
    ones; keys of the sequence that a token is in.
    """
    config, rows = tiny_model().config, batch()
    rank = {} if method == "full" else {"adapter.rank": 4}
    run = override(RunConfig(), {"adapter.method": method, "data.batch_size": 16, **rank})
    tokens, learned = np.count_nonzero(rows["segments"]), rows["loss_mask"].sum()
    lengths = [24] * 6 + [10, 14, 20]  # as `batch` divides its eight rows
    assert sum(lengths) == tokens
    sizes = [np.prod(a + b) for a, b in kernel_shapes(config).values()]
    base = tokens * config.num_layers * sum(sizes) + learned * config.vocab_size * config.base_width
    width = config.num_heads * config.head_dim
    keys = sum(n * (n + 1) / 2 for n in lengths)
    attention = 3.5 * 4 * keys * width * config.num_layers
    trained = 0 if method == "full" else 6 * tokens * count_params(config, run.adapter)
    want = (6 if method == "full" else 4) * base + trained + attention
    # Its rows are half of the run's: those of one process of two.
    np.testing.assert_allclose(batch_flops(run, config, rows), 2 * want)


def test_published_peaks():
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None and peak_flops("NVIDIA H100 PCIe") is None


def test_records_and_report(run, tmp_path, monkeypatch):
    run = override(run, {"train.steps": 4, "train.save_every": 2, "train.log_every": 1})
    run = override(run, {"train.profile": "2:2", "train.report_to": ()})
    monkeypatch.setattr(hooks, "peak_flops", lambda kind: 1e12)
    report = quiet_train(run, tmp_path / "a").report
    records = [x for x in read_metrics(tmp_path / "a" / "metrics.jsonl") if x["split"] == "train"]
    for record in records:
        assert record["device_tokens_per_s"] == record["tokens_per_s"]
        assert record["mfu"] == record["device_flops_per_s"] / 1e12 > 0
        assert 0 <= record["goodput"] < 1 and record["seconds"] > 0
    parts = "start", "compile", "data", "evaluation", "checkpoints"
    assert set(report["spent_seconds"]) == set(parts)
    spent = sum(report["spent_seconds"].values())
    np.testing.assert_allclose(report["goodput"], 1 - spent / report["seconds"], rtol=1e-3)
    assert 0 < report["goodput"] < 1

    # The trace holds the scopes by which the parts of a step are told apart.
    (trace,) = (tmp_path / "a" / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"/attn/", b"/mlp/", b"adapter/", b"loss", b"optimizer/"):
        assert scope in content, scope


def test_work_that_a_kill_lost_is_counted(run, tmp_path, monkeypatch):
    run = override(run, {"train.steps": 4, "train.save_every": 2, "train.log_every": 1})
    killed = RuntimeError("killed")

    class Killed(loop.Hook):
        def on_metrics(self, step, metrics, seconds):
            if step == 3:
                raise killed

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(hooks.StopOnSignal, "on_metrics", Killed().on_metrics.__func__)
        quiet_train(run, tmp_path)
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    saved = json.loads(next((tmp_path / "checkpoints" / "2").glob("*.json")).read_text())
    assert records[-1]["step"] == 3
    records[-1]["seconds"] = saved["seconds"] + 50.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = quiet_train(run, tmp_path).report
    np.testing.assert_allclose(report["spent_seconds"]["repeated"], 50.0)
    lost = sum(report["spent_seconds"].values())
    np.testing.assert_allclose(report["goodput"], 1 - lost / (report["seconds"] + 50), atol=1e-3)
    assert report["resumed_from"] == 2


def test_a_trace_ends_with_the_run(run, tmp_path):
    """Also where the run is shorter than the steps that were asked for; another can be started."""
    run = override(run, {"train.steps": 2, "optim.warmup_steps": 0, "train.profile": "2:50"})
    train(run, tmp_path, console=False)
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]
    jax.profiler.start_trace(str(tmp_path / "next"))
    jax.profiler.stop_trace()
    with pytest.raises(ConfigError, match=r"train\.profile.*STEP:COUNT"):
        override(run, {"train.profile": "0:2"})
