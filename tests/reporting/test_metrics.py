import struct
import sys
import time
from unittest.mock import Mock, call

import jax.numpy as jnp
import numpy as np
import pytest

from zflora_jax import ConfigError, RunConfig, override
from zflora_jax.reporting.metrics import MetricWriter, read_metrics
from zflora_jax.reporting.progress import announced
from zflora_jax.reporting.trackers import require_trackers
from zflora_jax.training.clock import Clock
from zflora_jax.training.hooks import LogMetrics
from zflora_jax.training.objective import CROSS_ENTROPY


def _events(workdir):
    """TensorBoard events in the order written: TFRecords of length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_records_are_on_disk_at_once_and_exact(tmp_path, capsys):
    with MetricWriter(tmp_path / "run", total_steps=3, console=False) as writer:
        writer.progress(1, "loss 1.0000")
        writer.write(1, "train", {"loss": jnp.float32(0.1), "tokens": np.int64(7)})
        wanted = {"step": 1, "split": "train", "loss": float(np.float32(0.1)), "tokens": 7.0}
        assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [wanted]
        writer.write(1, "eval", {"loss": float("nan")})
        with pytest.raises(ValueError, match=r"\['step'\] are reserved"):
            writer.write(1, "train", {"step": 2.0})
    last = {"step": 1, "split": "eval", "loss": None}
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [wanted, last]
    assert capsys.readouterr().out == ""
    scalars = [(e.step, v.tag) for e in _events(tmp_path / "run") for v in e.summary.value]
    assert scalars == [(1, "train/loss"), (1, "train/tokens"), (1, "eval/loss")]


def test_speed_is_told_of_all_tokens_and_of_target_tokens(tmp_path):
    """This process has two rows of four, with 7 tokens in them that are no padding."""
    run = override(RunConfig(), {"data.batch_size": 4})
    segments = np.asarray([[1, 1, 1, 0, 0], [1, 2, 2, 2, 0]])
    measured = {"loss": 1.0, "tokens": 3.0, "learning_rate": 0.1, "grad_norm": 2.0}
    with MetricWriter(tmp_path, total_steps=100, console=False) as writer:
        flops = lambda batch: 6.0  # noqa: E731
        hook = LogMetrics(writer, run, 8, CROSS_ENTROPY, flops, Clock(0.0))
        hook.on_batch(1, {"tokens": segments, "segments": segments})
        hook.on_metrics(1, measured, seconds=2.0)
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert [record[x] for x in ("tokens_per_s", "target_tokens_per_s", "epoch")] == [7, 1.5, 0.5]
    assert record["device_flops_per_s"] == 3


def _run(workdir, start, stop):
    with MetricWriter(workdir, total_steps=9, console=False, start_step=start) as writer:
        for step in range(start + 1, stop + 1):
            writer.write(step, "train", {"loss": step / 10})
            if step % 3 == 0:
                writer.write(step, "eval", {"loss": step / 20})


def test_resume_equals_an_uninterrupted_run(tmp_path):
    _run(tmp_path / "whole", 0, 9)
    _run(tmp_path / "resumed", 0, 8)  # killed after step 8, checkpoint at 6
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "spl')
    _run(tmp_path / "resumed", 6, 9)
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()
    starts = [e.step for e in _events(tmp_path / "resumed") if e.HasField("session_log")]
    assert starts == [0, 7]  # TensorBoard hides earlier events of steps >= 7


def test_resume_refuses_a_damaged_file_and_keeps_it(tmp_path):
    _run(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2', "{step: 2", 1))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="line 2: not a metrics record"):
        MetricWriter(tmp_path, total_steps=9, console=False, start_step=3)
    assert path.read_bytes() == before
    _run(tmp_path, 0, 1)  # a run from the start needs none of it, and drops it
    assert read_metrics(path) == [{"step": 1, "split": "train", "loss": 0.1}]


def test_progress_is_a_line_every_log_every_steps_elsewhere(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("zflora_jax.reporting.progress.time.monotonic", lambda: now[0])
    with MetricWriter(tmp_path, total_steps=25, log_every=10) as writer:
        for step in range(1, 26):
            writer.progress(step, f"loss {1 / step:.4f}")
            now[0] += 1.0
        with writer.part(9, "held-out loss") as advance:
            for _ in range(9):
                advance(1)
                now[0] += 4.0
    assert capsys.readouterr().out.splitlines() == [
        "step 1/25  loss 1.0000",
        "step 10/25  loss 0.1000  ETA 0:00:15",
        "step 20/25  loss 0.0500  ETA 0:00:05",
        "step 25/25  loss 0.0400  ETA 0:00:00",
        "held-out loss 4/9",
        "held-out loss 7/9",
    ]


def test_long_work_is_announced_and_short_work_is_not(capsys, monkeypatch):
    for after, said in ((0.01, "compiling\n"), (60.0, "")):
        monkeypatch.setattr("zflora_jax.reporting.progress.LONG", after)
        with announced("compiling"):
            time.sleep(0.1)
        assert capsys.readouterr().err == said


def test_progress_is_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with (
        pytest.raises(KeyboardInterrupt),
        MetricWriter(tmp_path, total_steps=4, start_step=2) as writer,
    ):
        writer.progress(3, "loss 0.5000")
        with writer.part(9, "held-out loss") as advance:
            advance(4)
        raise KeyboardInterrupt
    out = capsys.readouterr().out
    assert "3/4" in out and "0.5000" in out and "held-out loss" in out
    assert "\x1b[?25h" in out  # the cursor is shown again


# --- other trackers -------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """A package with the interface of wandb, as far as it is used."""
    package = Mock()
    package.init.return_value = package
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return package


def test_trackers_see_the_same_numbers_and_go_on_where_they_were(tmp_path, fake):
    workdir = tmp_path / "run"
    for start in (0, 2, 0):
        shown = ("tensorboard", "wandb"), {"adapter": {"rank": 4}}
        with MetricWriter(workdir, 9, False, start, *shown) as writer:
            writer.write(start + 1, "train", {"loss": 0.5})
    first, resumed, again = (made.kwargs for made in fake.init.call_args_list)
    wanted = {"config": {"adapter": {"rank": 4}}, "resume": "allow", "project": "zflora_jax"}
    assert first == resumed == first | wanted
    # A run from the start is another run.
    assert first["name"].startswith("run-") and again["name"] != first["name"]
    assert fake.finish.call_count == 3
    assert fake.log.call_args_list[1] == call({"train/loss": 0.5, "step": 3})
    fake.define_metric.assert_called_with("*", step_metric="step")
    assert first["id"] in first["name"] and first["dir"] == str(workdir)
    assert {v.tag for e in _events(workdir) for v in e.summary.value} == {"train/loss"}


def test_a_tracker_that_cannot_be_used_says_why(tmp_path, monkeypatch, fake):
    fake.init.side_effect = RuntimeError("no API key")
    with pytest.raises(ConfigError, match="wandb did not start: no API key"):
        MetricWriter(tmp_path, 9, console=False, report_to=("wandb",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'wandb', which is not installed: pip install"):
        require_trackers(("tensorboard", "wandb"))


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, caplog, fake):
    fake.log.side_effect = OSError("no space left")
    with MetricWriter(tmp_path, 9, False, report_to=("wandb", "tensorboard")) as writer:
        for step in (1, 2):
            writer.write(step, "train", {"loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [e.step for e in _events(tmp_path) if e.summary.value] == [1, 2]
    assert caplog.text.count("no space left") == 1 and not fake.finish.called
