"""A run that can be watched: rates of its devices and MFU, the time that no step took, traces."""

import json
import time

import jax
import numpy as np
import pytest
from support.models import tiny_model
from support.runs import quiet_train
from support.sharded import batch

from zflora_jax import ConfigError, count_params, override
from zflora_jax.core.architecture import kernel_shapes
from zflora_jax.core.bucket_path import BucketPath
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.roofline import batch_flops
from zflora_jax.experiments.train import train
from zflora_jax.parallel.targets import peak_flops
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import hooks
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.clock import Clock


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
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU v5") == 459e12
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
    assert sum(report["spent_seconds"].values()) < report["seconds"]
    assert 0 < report["goodput"] < 1

    # The trace holds the scopes by which the parts of a step are told apart.
    (trace,) = (tmp_path / "a" / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"/attn/", b"/mlp/", b"/adapter/", b"jvp(loss)", b"/optimizer/"):
        assert scope in content, scope
    assert b"_bootstrap_inner" not in content  # Python's calls


def killed_run(run, workdir, monkeypatch, after, seconds):
    """A run that dies when the metrics of step `after` are there, the last record `seconds` old."""

    def die(self, step, metrics, seconds):
        if step == after:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(hooks.StopOnSignal, "on_metrics", die)
        quiet_train(run, workdir)
    path = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-1]["step"] == after
    records[-1]["seconds"] = seconds
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_work_that_kills_lost_is_counted(run, tmp_path, monkeypatch):
    """Before the first checkpoint, twice, and after it; a missed evaluation counts once."""
    run = override(run, {"train.steps": 4, "train.save_every": 2, "train.log_every": 1})
    killed_run(run, tmp_path, monkeypatch, 1, 20.0)
    killed_run(run, tmp_path, monkeypatch, 1, 30.0)
    killed_run(run, tmp_path, monkeypatch, 3, 1000.0)
    saved = json.loads(next((tmp_path / "checkpoints" / "2").glob("*.json")).read_text())
    report = quiet_train(run, tmp_path).report
    spent, want = report["spent_seconds"], 20 + 30 + 1000 - saved["seconds"]
    np.testing.assert_allclose(spent["repeated"], want)
    lost = sum(spent.values()) - spent["data"]
    np.testing.assert_allclose(report["goodput"], 1 - lost / (report["seconds"] + want), atol=1e-3)
    assert report["resumed_from"] == 2


def test_the_last_checkpoint_is_waited_for_on_the_clock(run, tmp_path, monkeypatch):
    run = override(run, {"train.steps": 2, "optim.warmup_steps": 0, "train.save_every": None})
    commit = Checkpoints._commit
    monkeypatch.setattr(Checkpoints, "_commit", lambda *a: (time.sleep(1.5), commit(*a)))
    spent = quiet_train(run, tmp_path).report["spent_seconds"]
    assert spent["checkpoints"] + spent["evaluation"] > 1.5  # written while that runs


def test_goodput_leaves_the_wait_for_batches_in():
    clock = Clock(time.perf_counter() - 8, 2.0, {"data": 3.0, "start": 1.0, "repeated": 2.0})
    np.testing.assert_allclose(clock.goodput(), 1 - 3 / 12, rtol=1e-3)


def test_a_trace_is_of_its_steps(tmp_path, monkeypatch):
    """The metrics of a step come while the next one runs."""
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _, **__: said.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    hook = hooks.Profile.of("2:2", tmp_path)
    for step in range(1, 6):
        hook.on_batch(step, {})
        said.append(step)
        if step > 1:
            hook.on_metrics(step - 1, {}, 1.0)
    hook.close()
    assert said == [1, "start", 2, 3, 4, "stop", 5]


def test_a_trace_is_not_written_to_a_bucket(run, monkeypatch):
    bucket = BucketPath("s3://bucket/run")
    monkeypatch.setattr("zflora_jax.experiments.train.as_path", lambda *_: bucket)
    with pytest.raises(ConfigError, match="is in a bucket: trace a few steps in a local"):
        train(override(run, {"train.profile": "1:1"}), "s3://bucket/run", console=False)


def test_a_trace_ends_with_the_run(run, tmp_path, caplog):
    """Also where the run is shorter than the steps that were asked for; another can be started. It
    may be asked for when a run goes on, and says so if it has nothing to trace.
    """
    run = override(run, {"train.steps": 2, "optim.warmup_steps": 0, "train.profile": "2:50"})
    train(run, tmp_path, console=False)
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]
    jax.profiler.start_trace(str(tmp_path / "next"))
    jax.profiler.stop_trace()
    more = override(run, {"optim.schedule": "constant", "train.profile": "9:1"})
    train(override(more, {"train.profile": None}), tmp_path / "more", console=False)
    train(override(more, {"train.steps": 3}), tmp_path / "more", console=False)
    assert "so nothing was traced" in caplog.text
    with pytest.raises(ConfigError, match=r"train\.profile.*STEP:COUNT"):
        override(run, {"train.profile": "0:2"})
