"""A run that is killed goes on as if it had not been: a real kill, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
from support.checks import assert_trees_equal
from support.runs import quiet_train, saved_state

from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.reporting.metrics import read_metrics


def train_in_subprocess(run: RunConfig, workdir: Path) -> subprocess.Popen[bytes]:
    """`run` trained by a process of its own, compiled as in this one (conftest.py)."""
    program = (
        "import sys, json, zflora_jax as zf; from zflora_jax.core.fields import from_dict;"
        " zf.train(from_dict(zf.RunConfig, json.loads(sys.argv[1])), sys.argv[2], console=False)"
    )
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(dataclasses.asdict(run)), str(workdir)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(run, tmp_path):
    """kill -9 during training; then to the end, in another process. Parameters, optimizer state and
    every logged loss are those of one run. `make soak` kills fifty times.
    """
    run = override(run, {"train.steps": 40, "train.max_to_keep": 3, "eval.limit": 2})
    process = train_in_subprocess(run, tmp_path / "killed")
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(r["step"] >= 5 for r in read_metrics(metrics)):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0].decode()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for name in ("whole", "killed"):
        quiet_train(run, tmp_path / name)
    resumed_from = json.loads((tmp_path / "killed" / "report.json").read_text())["resumed_from"]
    assert 2 <= resumed_from < 40
    starts = [
        json.loads(line) for line in (tmp_path / "killed" / "starts.jsonl").read_text().splitlines()
    ]
    assert (
        len(starts) == 2
        and starts[0]["step"] == 0
        and starts[1]["step"] == resumed_from
        and starts[1]["jax"] == jax.__version__
    )
    assert_trees_equal(*(saved_state(run, tmp_path / name) for name in ("killed", "whole")))
    losses = [
        [
            (r["step"], r["loss"])
            for r in read_metrics(tmp_path / w / "metrics.jsonl")
            if r["split"] == "train"
        ]
        for w in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 40
