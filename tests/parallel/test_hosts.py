"""Runs of several processes on loopback: the numbers of one process, one set of files, a stop that
all agree on; wrong start-ups say what to give.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.checks import assert_trees_equal
from support.hosts import config_file, finish, spawn

from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.evaluation.task import one_day
from zflora_jax.experiments.restore import load_run
from zflora_jax.parallel import distributed
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.lock import locked

# `zflora`, which waits a second, not ten, for a workdir that it does not see.
PROGRAM = """
import sys
from zflora_jax.parallel import distributed
distributed.SHARED_WITHIN = 1.0
from zflora_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def four(run: RunConfig) -> RunConfig:
    """A run over four devices."""
    return override(run, {"mesh.data": 2, "mesh.fsdp": 2, "data.grad_accum_steps": 1})


def launch(
    run: RunConfig, workdir: Path, processes: int, devices: int, given: str | None = None
) -> list[subprocess.Popen[str]]:
    """`zflora train` in `processes` processes of `devices` CPU devices each; given: the --workdir
    that they are given, if it is another.
    """
    config = config_file(run, workdir.parent / f"{workdir.name}.py")
    argv = ["train", "--config", config, "--workdir", given or str(workdir)]
    return spawn(["-c", PROGRAM, *argv], processes, devices, flags=True)


def losses(workdir: Path) -> np.ndarray:
    records = read_metrics(workdir / "metrics.jsonl")
    names = ("step", "loss", "tokens")
    return np.asarray([[r[name] for name in names] for r in records if r["split"] == "train"])


@pytest.mark.soak
def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(four, tmp_path):
    """SIGTERM to process 1 alone: both save the same step and end with 75. Two processes go on bit
    for bit, one process on another mesh up to rounding.
    """
    rate = {"optim.learning_rate": 1e-4, "optim.schedule": "constant"}
    four = override(four, {"train.steps": 400, "train.save_every": None} | rate)
    processes = launch(four, tmp_path / "run", 2, 2)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while (
        time.monotonic() < deadline
        and all(p.poll() is None for p in processes)
        and not (metrics.exists() and len(read_metrics(metrics)) > 3)
    ):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes, 75)
    assert "stopped by a signal after step" in first
    _, _, _, step = load_run(tmp_path / "run")
    assert 3 < step < 400 and not (tmp_path / "run" / "report.json").exists()
    assert losses(tmp_path / "run")[-1, 0] == step

    for name in ("two", "one"):  # each goes on, as if the run were to end three steps later
        shutil.copytree(tmp_path / "run", tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(config.read_text().replace('"steps": 400', f'"steps": {step + 3}'))
    four = override(four, {"train.steps": step + 3})
    finish(launch(four, tmp_path / "two", 2, 2))
    finish(launch(override(four, {"mesh.data": 1, "mesh.fsdp": 1}), tmp_path / "one", 1, 1))
    for name in ("two", "one"):
        assert json.loads((tmp_path / name / "report.json").read_text())["resumed_from"] == step
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-5)
    assert losses(tmp_path / "two")[-1, 0] == step + 3
    finish(launch(four, tmp_path / "whole", 2, 2))
    np.testing.assert_array_equal(losses(tmp_path / "two"), losses(tmp_path / "whole"))
    assert_trees_equal(load_run(tmp_path / "two")[2], load_run(tmp_path / "whole")[2])


def test_what_process_0_refuses_ends_all(four, tmp_path):
    """The workdir is held by another process: neither process is left waiting."""
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        first, second = launch(four, tmp_path / "run", 2, 2)
        (out, _), (other, _) = first.communicate(timeout=200), second.communicate(timeout=200)
    assert first.returncode == 2 and "is being trained by another process" in out
    assert second.returncode != 0 and "Traceback" not in other, other[-2000:]


def test_processes_without_a_shared_workdir_end_at_once(four, tmp_path, monkeypatch):
    """As on two hosts that each have a local disk: here by two working directories and one relative
    path.
    """
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    real = subprocess.Popen
    places = iter([tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **kw: real(*a, cwd=next(places), **kw))
    (tmp_path / "config").mkdir()
    started = time.monotonic()
    processes = launch(four, tmp_path / "config" / "run", 2, 2, given="run")
    outputs = finish(processes, 2)
    assert time.monotonic() - started < 120
    assert all(
        "workdir run is not shared: of 2 processes, 1 did not see" in out and "Traceback" not in out
        for out in outputs
    )
    # Nothing was left behind, by process 0 either.
    assert sorted(p.name for p in tmp_path.glob("*/run/*")) == []


def test_a_signal_before_the_first_step_of_a_resumed_run_stops_it(monkeypatch):
    """JAX's preemption service then asks for a stop at call 1."""
    asked: list[int] = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda n: (asked.append(n), n == 1)[1],
    )
    signals = distributed.StopSignals()
    assert signals.requested(5) and asked == [1, 2, 3, 4, 5]
    assert not signals.requested(6) and asked[-1] == 6


def test_whatever_process_0_raises_reaches_the_others(monkeypatch):
    """Process 0 of two, which gathers its own bytes from the other one, and then process 1."""
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    both = lambda own: np.stack([jnp.asarray(own)] * 2)  # noqa: E731  # with jax's integers
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", both)
    assert distributed.gather_bytes(b"abc") == [b"abc"] * 2
    told = []
    real = distributed.from_process_0
    monkeypatch.setattr(distributed, "from_process_0", lambda x: (told.append(x), real(x))[1])
    with pytest.raises(ZeroDivisionError):
        distributed.on_main(lambda: 1 / 0)
    assert distributed.on_main(lambda: "done") == "done" and told == [False, True]
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_process_0", lambda _: False)
    with pytest.raises(ConfigError, match="process 0 cannot go on; its message says why"):
        distributed.on_main(lambda: pytest.fail("not process 0"))


def test_all_processes_tell_their_templates_the_day_of_process_0(run, monkeypatch):
    """Also where each has put today into the settings, some before and some after midnight."""
    monkeypatch.setattr(distributed, "from_process_0", lambda _: "2026-11-25")
    for own in (None, "2026-11-26"):
        assert one_day(override(run, {"data.date": own})).data.date == "2026-11-25"


@pytest.fixture
def started(monkeypatch) -> list[tuple]:
    """What JAX's runtime is started with, without variables of the environment."""
    for name in distributed.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    given: list[tuple] = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *of: given.append(of))
    return given


def test_the_environment_can_start_a_run(started, monkeypatch):
    distributed.start()
    distributed.start("localhost:1", 1, 0)
    assert distributed.is_main() and not started  # a run without the flags is one process
    values = ("10.0.0.1:1234", "4", "3")
    for name, value in zip(distributed.ENVIRONMENT.values(), values, strict=True):
        monkeypatch.setenv(name, value)
    distributed.start()
    distributed.start(process_id=0)
    assert started == [("10.0.0.1:1234", 4, 3), ("10.0.0.1:1234", 4, 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1",), r"needs --num-processes \(or ZFLORA_NUM_PROCESSES\), --process-id"),
        (("localhost:1", 2, "three"), "--process-id 'three': expected a whole number"),
        (("localhost", 2, 0), r"did not start with --coordinator localhost \(HOST:PORT"),
        (("localhost:1", 2, 2), "numbered from 0 to 1"),
        (("localhost:1", 2, 0, True), "leave out --coordinator"),
        ((None, None, None, True), r"did not start by detection \(SLURM"),
    ],
)
def test_wrong_start_ups(arguments, message, monkeypatch):
    for name in distributed.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        distributed.start(*arguments[:3], detect=len(arguments) > 3)


def test_a_bug_in_one_process_does_not_keep_the_others_waiting(monkeypatch):
    """Its traceback is there, and the process leaves at once."""
    left = []
    monkeypatch.setattr(distributed, "leave", lambda *given: left.append(given))
    monkeypatch.setattr("zflora_jax.cli.eval.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        main(["eval", "--model", "m"])
    assert left == [(1, error.value)]
