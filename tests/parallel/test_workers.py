"""Processes that share a sweep: cores of their own, exit codes, signals, the command they run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.paths import ROOT
from support.runs import small_run

from zflora_jax.cli.main import main
from zflora_jax.core.fields import ConfigError
from zflora_jax.parallel import workers
from zflora_jax.parallel.workers import cores_of, run_pinned

linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity of processes")
several = pytest.mark.skipif(len(cores_of(1)[0]) == 1, reason="one core")


@linux
@several
def test_cores_are_divided():
    mine = os.sched_getaffinity(0)
    found = cores_of(2)
    assert found[0] | found[1] == mine and not found[0] & found[1]
    assert abs(len(found[0]) - len(found[1])) <= 1
    for count in (0, len(mine) + 1):
        with pytest.raises(ConfigError, match=rf"workers={count}: must be within 1\.\."):
            cores_of(count)


@linux
@several
def test_each_worker_has_its_cores_and_exit_code(tmp_path):
    code = (
        "import os, sys, pathlib, time; time.sleep(0.3); cores = sorted(os.sched_getaffinity(0));"
        " (pathlib.Path(sys.argv[1]) / str(os.getpid())).write_text(str(cores));"
        " sys.exit(cores[0] != min(map(int, sys.argv[2].split(','))))"
    )
    mine = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-c", code, str(tmp_path), ",".join(map(str, mine))]
    assert sorted(run_pinned(command, 2)) == [0, 1]
    found = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert sorted(core for cores in found for core in cores) == mine


def test_a_signal_is_an_exit_code():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_pinned([sys.executable, "-c", code], 1) == [137]


@several
def test_sigterm_reaches_the_workers(tmp_path):
    child = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, str(time.monotonic_ns())).touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import sys; from zflora_jax.parallel.workers import run_pinned;"
        f"print(run_pinned([sys.executable, '-c', {child!r}], 2))"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[0].strip() == b"[75, 75]"


CONFIG = """
from zflora_jax.experiments.grid import Grid
from support.runs import small_run
def get_sweep():
    return Grid("shared", small_run({model!r}), {{"data.seed": [0, 1]}})
"""


def test_a_sweep_of_several_workers(base_dir, tmp_path, monkeypatch, capsys):
    """Each runs the same command, alone it would make all; the first process writes the tables."""
    config, out = tmp_path / "config.py", tmp_path / "out"
    config.write_text(CONFIG.format(model=base_dir))
    ran = []

    def run_here(command, count):
        assert command[:3] == [sys.executable, "-m", "zflora_jax.cli"] and count == 2
        ran.append(main(command[3:]))
        return [ran[-1], 0]

    monkeypatch.setattr(workers, "run_pinned", run_here)
    words = ["sweep", "--config", str(config), "--workdir", str(tmp_path / "runs")]
    words += ["--out", str(out), "--workers", "2", "--set", "train.steps=4"]
    assert main(words) == 0 and ran == [0]
    rows = json.loads((out / "shared.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [4, 4]
    assert capsys.readouterr().out.count("shared: data.seed") == 2  # by the first alone

    monkeypatch.setattr(workers, "run_pinned", lambda *_: [0, 75])
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 75
    # Killed for want of memory: the caller makes what is left, writes the tables and says so.
    (out / "shared.md").unlink()
    (tmp_path / "runs" / "data.seed=1" / "row.json").unlink()
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [0, 137])
    assert main(words) == 0 and (out / "shared.md").is_file()
    assert "1 of 2 workers were killed" in capsys.readouterr().err
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [137, 139])
    with pytest.raises(SystemExit) as crashed:
        main(words)
    assert crashed.value.code == 139 and "ended by signal 11" in capsys.readouterr().err
    assert small_run(base_dir).train.steps != 4


GRID = """from zflora_jax.config import RunConfig
from zflora_jax.experiments.grid import Grid

def get_sweep():
    return Grid("g", RunConfig(), {"train.seed": [0, 1]})
"""


def test_the_tables_of_a_grid_are_refused(refused, tmp_path):
    (tmp_path / "g.py").write_text(GRID)
    assert "--tables is for comparisons" in refused(
        "sweep", "--config", tmp_path / "g.py", "--workdir", tmp_path / "w", "--tables"
    )
    assert not (tmp_path / "w").exists()


def test_tables_of_other_settings_are_not_written_over(refused, tmp_path):
    """A page that is there stays as it is where no record has the settings that are given."""
    results = ROOT / "results"
    for name in ("accuracy_arithmetic", "accuracy_cloze"):
        shutil.copytree(results / name, tmp_path / name)
    (tmp_path / "accuracy_arithmetic.md").write_text("the page")
    command = ["sweep", "--config", "configs/accuracy.py", "--tables", "--workdir", tmp_path / "w"]
    command += ["--only", "accuracy_arithmetic", "--out", tmp_path]
    assert "is of a whole run with these settings" in refused(*command, "--set", "train.steps=20")
    assert "--workers=2 shares runs, and --tables makes none" in refused(*command, "--workers", "2")
    assert (tmp_path / "accuracy_arithmetic.md").read_text() == "the page"


def test_tables_without_a_run_are_left_out(capsys, tmp_path):
    command = ["sweep", "--config", "configs/accuracy.py", "--tables", "--workdir"]
    assert main([*command, str(tmp_path / "w"), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("no run with these settings is there") == 7
    assert not list(tmp_path.glob("*.md"))
