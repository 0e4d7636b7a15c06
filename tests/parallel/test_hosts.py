"""Runs of several processes on loopback: the numbers of one process, one set of files, a stop that
all agree on; wrong start-ups say what to give.
"""

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
from support.hosts import config_file, finish, losses, spawn
from support.tasks import write_questions

from zflora_jax import RunConfig, load_run, locked
from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.evaluation.task import one_day
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import write_json
from zflora_jax.reporting.metrics import read_metrics


@pytest.fixture
def four(run: RunConfig) -> RunConfig:
    """A run over four devices."""
    return override(run, {"mesh.data": 2, "mesh.fsdp": 2, "data.grad_accum_steps": 1})


def launch(
    run: RunConfig, workdir: Path, processes: int, devices: int
) -> list[subprocess.Popen[str]]:
    """`zflora train` in `processes` processes of `devices` CPU devices each."""
    config = config_file(run, workdir.parent / f"{workdir.name}.py")
    argv = ["train", "--config", config, "--workdir", str(workdir)]
    return spawn(["-m", "zflora_jax.cli", *argv], processes, devices, flags=True)


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


# Each case in both processes, which go on after a refusal; then a command.
CASES = """
import json, sys
sys.modules["torch"] = None  # transformers would load it, for 3 seconds
import jax
from zflora_jax.core.fields import ConfigError, from_dict, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.restore import load_run
from zflora_jax.experiments.train import train
from zflora_jax.parallel import distributed
from zflora_jax.parallel.sharding import make_mesh

distributed.SHARED_WITHIN = 1.0
distributed.start()
base, cases, shared, argv = json.loads(sys.argv[1])
for name, changes in cases.items():
    me = {key: values[jax.process_index()] for key, values in changes.items()}
    run = override(from_dict(RunConfig, base), me)
    try:
        if name == "load":
            load_run("run")
        elif name == "evaluate":
            evaluate(run, load_base(run, make_mesh(run.mesh)), console=False)
        else:
            train(run, name if name == "unshared" else f"{shared}/{name}", console=False)
        print(name, "was not refused")
    except ConfigError as error:
        print(error)
from zflora_jax.cli.main import main
sys.exit(main(argv[jax.process_index()]))
"""


def test_processes_that_differ_are_refused_before_they_share_anything(four, tmp_path):
    """Settings, models, rows, runs, options; as on two hosts with a local disk each, which then do
    not see one workdir. Nor is a process left waiting for what process 0 refuses.
    """
    for name, (rows, held_out, rate) in {"a": (13, 4, 0.1), "b": (16, 2, 0.2)}.items():
        here = tmp_path / name
        shutil.copytree(four.model, here / "model")
        for folder, (train, test) in {"rows": (rows, 4), "test": (16, held_out)}.items():
            write_questions(here / folder / "train.jsonl", [f"{i}?" for i in range(train)])
            write_questions(here / folder / "test.jsonl", [f"{i}!" for i in range(test)])
        trained = override(four, {"optim.weight_decay": rate})
        write_json(here / "run" / "config.json", to_dict(trained))
    weights = tmp_path / "b" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    own = {"data.task": ["rows"] * 2, "data.train_limit": [None] * 2}
    cases = {
        "settings": {"optim.learning_rate": [0.01, 0.5]},
        "model": {"model": ["model"] * 2},
        "rows": {"data.data_dir": ["rows"] * 2, **own},
        "held out": {"data.data_dir": ["test"] * 2, **own},
        "evaluate": {"data.data_dir": ["test"] * 2, **own},
        "load": {},
        "unshared": {},
        "locked": {},
    }
    argv = [["eval", "--model", "model", "--limit", limit] for limit in ("5", "6")]
    shared, folders = tmp_path / "shared", [tmp_path / "a", tmp_path / "b"]
    (shared / "locked").mkdir(parents=True)
    words = ["-c", CASES, json.dumps([to_dict(four), cases, str(shared), argv])]
    with locked(shared / "locked"):
        outputs = finish(spawn(words, 2, 2, folders=folders), 2)
    assert "is being trained by another process" in outputs[0]
    assert "process 0 has failed; its message says why" in outputs[1]
    for out in outputs:
        assert "Traceback" not in out and "was not refused" not in out
        for line in (
            "optim.learning_rate: 0.01 in process 0; 0.5 in process 1",
            "files of model model: ",
            "train_rows: 12 in process 0; 15 in process 1",
            "test_rows: 4 in process 0; 2 in process 1",
            "rows of rows: 4 in process 0; 2 in process 1",
            "optim.weight_decay: 0.1 in process 0; 0.2 in process 1",
            "limit: 5 in process 0; 6 in process 1",
        ):
            assert f"\n  {line}" in out, line
        assert out.count("Give every process the same command, settings, model and data.") == 7
        assert "workdir unshared is not shared: of 2 processes, 1 did not see" in out
    left = [*tmp_path.glob("*/unshared/*"), *shared.glob("*/*")]  # by process 0, too
    assert [path.name for path in left] == [".lock"]


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
    with pytest.raises(ConfigError, match="process 0 has failed; its message says why"):
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
