"""Runs in processes of their own, which are killed."""

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

from zflora_jax.core.run_config import RunConfig
from zflora_jax.reporting.metrics import read_metrics


def train_in_subprocess(run: RunConfig, workdir: Path) -> subprocess.Popen[bytes]:
    """`run` trained by a process of its own, compiled as in this one (conftest.py)."""
    program = (
        "import sys, json, zflora_jax as zf; from zflora_jax.core.fields import from_dict;"
        " zf.train(from_dict(zf.RunConfig, json.loads(sys.argv[1])), sys.argv[2], console=False)"
    )
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if kept := jax.config.jax_compilation_cache_dir:
        # It reads the kept programs, and writes none, of which a kill might leave half.
        least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
        env |= {"JAX_COMPILATION_CACHE_DIR": str(kept), least: "1e9"}
    return subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(dataclasses.asdict(run)), str(workdir)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_while_training(run: RunConfig, workdir: Path, after: int) -> None:
    """Train `run` in a process of its own, and kill -9 it once `after` steps are logged."""
    process = train_in_subprocess(run, workdir)
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and any(r["step"] >= after for r in read_metrics(metrics)):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0].decode()[-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
